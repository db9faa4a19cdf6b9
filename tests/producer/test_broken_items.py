"""Broken items in the broker: each is removed and stored, and does not affect other messages, also a day
later."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Consumer, Queue

from openagents_worker.celery import kombu_redis as broker
from openagents_worker.celery.kombu_redis import TRANSPORTS
from openagents_worker.producer.broken_items import BrokenItems
from tests.producer.test_broker import channel_of
from tests.support.waiting import PATIENCE_S

QUEUE = "agents"
DEEP = "[" * 100_000 + "]" * 100_000
TAGGED = '"properties": {"delivery_tag": "t", "delivery_info": {"exchange": "", "routing_key": "agents"}}'

NOT_MESSAGES: dict[str, str | bytes] = {
    "not JSON": "{",
    "empty": "",
    "a number": "7",
    "a list": "[1]",
    "nothing": "null",
    "an empty object": "{}",
    "binary": b"\xff\xfe\x00\x80",
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00.",
    "UTF-16": "{}".encode("utf-16"),
    "nested deeply": DEEP,
    "deep in a message": "{" + TAGGED + ', "body": "x", "headers": {"a": ' + DEEP + "}}",
    "an integer of 5,000 digits": "{" + TAGGED + ', "body": "x", "headers": {"a": ' + "9" * 5000 + "}}",
    "a type that is not known": "{"
    + TAGGED
    + ', "body": "x", "headers": {"__type__": "zzz", "__value__": 1}}',
    "a date that is not one": "{"
    + TAGGED
    + ', "body": "x", "headers": {"__type__": "datetime", "__value__": 1}}',
    "no delivery tag": '{"properties": {"delivery_info": {}}, "body": "x"}',
    "a list for a tag": '{"properties": {"delivery_tag": [], "delivery_info": {}}, "body": "x"}',
    "no delivery info": '{"properties": {"delivery_tag": "t"}, "body": "x"}',
    "a list for delivery info": '{"properties": {"delivery_tag": "t", "delivery_info": []}, "body": "x"}',
    "no body": "{" + TAGGED + "}",
    "a number for a body": "{" + TAGGED + ', "body": 7}',
    "a number for headers": "{" + TAGGED + ', "body": "x", "headers": 7}',
    "encoding that is not known": '{"properties": {"delivery_tag": "t", "delivery_info": {"exchange": "", '
    '"routing_key": "agents"}, "body_encoding": "zzz"}, "body": "x"}',
    "base64 that is not": '{"properties": {"delivery_tag": "t", "delivery_info": {"exchange": "", '
    '"routing_key": "agents"}, "body_encoding": "base64"}, "body": "x"}',
    "half a character": '{"properties": {"delivery_tag": "\\ud800", "delivery_info": []}, "body": "\\ud800"}',
}


@pytest.fixture(autouse=True)
def _whatever_comes_was_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "AT_ONCE_S", float("inf"))


@pytest.fixture
def kept() -> list[tuple[str, str, str, object]]:
    return []


@pytest.fixture
def line(redis_url: str, kept: list[Any]) -> Iterator[Connection]:
    with Connection(redis_url, transport=TRANSPORTS["redis"]) as connection:
        connection.transport.broken = BrokenItems(lambda *item: kept.append(item), "oa")
        yield connection


def publish(line: Connection, *ids: str) -> None:
    for id_ in ids:
        line.Producer().publish(
            {}, routing_key=QUEUE, exchange="", headers={"id": id_, "task": "shop.mail"}, serializer="json"
        )


def take(line: Connection, *, room: int, until: str) -> list[str]:
    """The ids of the messages that are taken and acknowledged, up to the given id."""
    taken: list[str] = []

    def take_one(_: Any, message: Any) -> None:
        taken.append(message.headers["id"])
        message.ack()

    channel = channel_of(line)
    channel.free_slots = lambda: room
    with Consumer(channel, [Queue(QUEUE)], callbacks=[take_one]):
        while until not in taken:
            line.drain_events(timeout=PATIENCE_S)
    return taken


def left(line: Connection) -> set[str]:
    client = channel_of(line).client
    return {key.decode() for key in client.scan_iter() if not key.startswith(b"_kombu")}


@pytest.mark.parametrize("room", [0, 10], ids=["taken alone", "taken with others"])
@pytest.mark.parametrize("item", NOT_MESSAGES.values(), ids=NOT_MESSAGES.keys())
def test_what_is_not_a_message_is_kept_and_never_comes_back(
    line: Connection, kept: list[Any], item: str | bytes, room: int
) -> None:
    """It is removed from its queue and from the unacknowledged messages; the messages around it are taken."""
    publish(line, "a")
    channel_of(line).client.lpush(QUEUE, item)
    publish(line, "b")

    assert take(line, room=room, until="b") == ["a", "b"]
    assert left(line) == set()
    [(where, code, why, _)] = kept
    assert (where, code) == (QUEUE, "message.unreadable")
    assert why


@pytest.mark.parametrize("item", NOT_MESSAGES.values(), ids=NOT_MESSAGES.keys())
def test_what_another_worker_took_and_could_not_read_stops_nobody(
    line: Connection, kept: list[Any], item: str | bytes
) -> None:
    """A worker of an earlier version left it unacknowledged; after the visibility timeout all look at it."""
    raw = item if isinstance(item, bytes) else item.encode()
    client = channel_of(line).client
    whole = b"[" + raw + b', "", "agents"]'
    good: dict[str, Any] = {
        "properties": {"delivery_tag": "g", "delivery_info": {"exchange": "", "routing_key": QUEUE}},
        "body": "{}", "content-encoding": "utf-8", "content-type": "application/json",
        "headers": {"id": "good"},
    }  # fmt: skip
    for tag, stored in (("1", raw), ("2", whole), ("3", json.dumps([good, "", QUEUE]).encode())):
        client.zadd("unacked_index", {tag: 1})
        client.hset("unacked", tag, stored)

    line.default_channel.qos.restore_visible(interval=1)

    assert take(line, room=10, until="good") == ["good"]
    assert left(line) == set()
    assert len(kept) == (2 if raw else 1)  # an empty item is not stored


@pytest.mark.parametrize(
    "where", ["oa:due", "unacked", "agents\x06\x163", "_kombu.binding.x", 7, None, ["x"]]
)
def test_a_message_goes_back_to_no_queue_that_is_a_key(line: Connection, kept: list[Any], where: Any) -> None:
    """The sender sets the origin of a message. The message returns there when a worker stops."""
    client = channel_of(line).client
    message = {"properties": {"delivery_tag": "t", "delivery_info": {}}, "body": "x", "headers": {}}
    client.zadd("unacked_index", {"t": 1})
    client.hset("unacked", "t", json.dumps([message, "", where]))

    line.default_channel.qos.restore_visible(interval=1)

    assert left(line) == set()
    assert [entry[0] for entry in kept] == ["unacked"]


TYPES = {QUEUE: "list", f"{QUEUE}\x06\x163": "list", "unacked": "hash", "unacked_index": "zset"}
OTHERS = [
    (key, kind)
    for key, own in TYPES.items()
    for kind in ("string", "hash", "set", "zset", "list")
    if kind != own
]


@pytest.mark.parametrize(("key", "kind"), OTHERS)
def test_a_key_of_the_broker_that_is_something_else_is_put_aside(
    line: Connection, kept: list[Any], key: str, kind: str
) -> None:
    """Every worker would end at its first command."""
    client = channel_of(line).client
    write = {
        "string": lambda: client.set(key, "x"), "hash": lambda: client.hset(key, "x", "x"),
        "set": lambda: client.sadd(key, "x"), "zset": lambda: client.zadd(key, {"x": 1}),
        "list": lambda: client.rpush(key, "x"),
    }  # fmt: skip
    write[kind]()
    publish(line, "a", "b")
    assert take(line, room=10, until="b") == ["a", "b"]

    moved = [name for name in left(line) if ".put_aside." in name]
    assert [name.partition(".put_aside.")[0] for name in moved] == [key]
    assert client.ttl(moved[0]) > 0
    client.delete(*moved)


def test_no_key_of_this_library_is_read_as_a_queue(line: Connection) -> None:
    """Remote control can tell a worker to read any queue: the key stays as it is."""
    client = channel_of(line).client
    client.zadd("oa:due", {"r1": 1})

    with pytest.raises(ValueError, match="oa:due"):
        Consumer(line.default_channel, [Queue("oa:due")], auto_declare=False).consume()
    with pytest.raises(line.channel_errors):
        Queue("oa:due")(line.default_channel).declare()
    with pytest.raises(line.channel_errors):
        line.Producer().publish({}, routing_key="oa:due", exchange="", serializer="json")

    assert client.zrange("oa:due", 0, -1) == [b"r1"]
    client.delete("oa:due")
