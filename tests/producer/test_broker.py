"""The broker transport: how it stores messages that are taken and not acknowledged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub

from openagents_worker.celery import kombu_redis as broker
from openagents_worker.celery.kombu_redis import TRANSPORTS
from openagents_worker.producer import redis_transport
from openagents_worker.producer.message_names import RUN_AGENT
from tests.support.lossy_proxy import Proxy
from tests.support.waiting import PATIENCE_S, wait_for

QUEUE = "agents"
WAKE_UP = {"task": RUN_AGENT, "wake_us": "1", "id": "r1"}
FOREIGN = {"task": RUN_AGENT, "id": "r2"}
OTHER = {"task": "shop.send_mail", "id": "r3"}


@pytest.fixture(autouse=True)
def _whatever_comes_was_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine an answer takes longer than `AT_ONCE_S`."""
    monkeypatch.setattr(broker, "AT_ONCE_S", float("inf"))


@pytest.fixture
def line(redis_url: str) -> Iterator[Connection]:
    with Connection(redis_url, transport=TRANSPORTS["redis"]) as connection:
        yield connection


def channel_of(line: Connection) -> Any:
    """The channel of Redis; kombu's types have only what all transports share."""
    return line.default_channel


def take(line: Connection, *headers: dict[str, Any]) -> list[Any]:
    """Send messages with these headers and take them, without an acknowledgement."""
    producer = line.Producer()
    for given in headers:
        producer.publish({"n": given["id"]}, routing_key=QUEUE, exchange="", headers=given, serializer="json")
    taken: list[Any] = []
    with Consumer(line.default_channel, [Queue(QUEUE)], callbacks=[lambda _, message: taken.append(message)]):
        while len(taken) < len(headers):
            line.drain_events(timeout=PATIENCE_S)
    return taken


def in_redis(line: Connection) -> list[str]:
    """The ids of the messages that kombu's hash holds."""
    stored = channel_of(line).client.hvals("unacked")
    return sorted(json.loads(text)[0]["headers"]["id"] for text in stored)


def waiting(line: Connection) -> list[str]:
    stored = channel_of(line).client.lrange(QUEUE, 0, -1)
    return [json.loads(text)["headers"]["id"] for text in stored]


def test_a_wake_up_costs_no_write_until_it_is_acknowledged(line: Connection) -> None:
    """Its run is in Redis. All other messages are stored, also those of runs that are not accepted yet."""
    taken = take(line, WAKE_UP, FOREIGN, OTHER)

    assert in_redis(line) == ["r2", "r3"]
    for message in taken:
        message.ack()
    assert in_redis(line) == []
    assert waiting(line) == []


def test_what_is_put_back_waits_again(line: Connection) -> None:
    """A worker that cannot take a message now returns it for another worker, for every kind of message."""
    for message in take(line, WAKE_UP, OTHER):
        message.requeue()

    assert sorted(waiting(line)) == ["r1", "r3"]
    assert in_redis(line) == []
    channel_of(line).client.delete(QUEUE)


def test_what_is_rejected_is_gone(line: Connection) -> None:
    """A message that no worker can use leaves no data."""
    for message in take(line, WAKE_UP, OTHER):
        message.reject()

    assert waiting(line) == in_redis(line) == []


def test_a_connection_that_closes_puts_back_what_it_has(redis_url: str) -> None:
    """A worker that stops between taking and accepting a message loses none."""
    with Connection(redis_url, transport=TRANSPORTS["redis"]) as line:
        take(line, WAKE_UP, OTHER)
        line.default_channel.close()

    with Connection(redis_url, transport=TRANSPORTS["redis"]) as line:
        assert sorted(waiting(line)) == ["r1", "r3"]
        assert in_redis(line) == []
        channel_of(line).client.delete(QUEUE)


def publish(line: Connection, *headers: dict[str, Any]) -> None:
    producer = line.Producer()
    for given in headers:
        producer.publish({"n": given["id"]}, routing_key=QUEUE, exchange="", headers=given, serializer="json")


def take_with_room(line: Connection, *rooms: int) -> list[list[str]]:
    """The ids of the messages that are taken together with this many free slots; one list for each read."""
    channel, taken, times = channel_of(line), [], []
    with Consumer(channel, [Queue(QUEUE)], callbacks=[lambda _, message: taken.append(message)]):
        for room in rooms:
            channel.free_slots = lambda room=room: room
            before = len(taken)
            line.drain_events(timeout=PATIENCE_S)
            times.append([message.headers["id"] for message in taken[before:]])
    for message in taken:
        message.ack()
    return times


def some(kind: dict[str, Any], *ids: str) -> list[dict[str, Any]]:
    return [{**kind, "id": id_} for id_ in ids]


def test_as_many_are_taken_at_once_as_can_be_begun(line: Connection) -> None:
    """In the order of the queue, one at least, and no more than there is room for: others may begin them."""
    publish(line, *some(WAKE_UP, "a", "b", "c", "d", "e", "f", "g"))

    assert take_with_room(line, 2, 0, 100) == [["a", "b", "c"], ["d"], ["e", "f", "g"]]
    assert waiting(line) == []


def test_what_is_taken_beside_the_first_is_noted_in_the_same_step(
    line: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other messages cannot be lost between the queue and kombu's hash; their entry has kombu's form."""
    publish(line, *some(OTHER, "a", "b"), *some(WAKE_UP, "c"))
    channel = channel_of(line)
    with Consumer(channel, [Queue(QUEUE)], callbacks=[lambda _, message: None]):
        channel.free_slots = lambda: 10
        channel.connection._deliver = lambda message, queue: None  # it dies before it has done anything
        with monkeypatch.context() as patch:
            patch.setattr(broker.time, "time", lambda: 1234.5)
            line.drain_events(timeout=PATIENCE_S)

    assert in_redis(line) == ["b"]  # "a" was taken by kombu's own command
    [tag] = channel.client.hkeys("unacked")
    assert channel.client.zscore("unacked_index", tag) == 1234.5
    channel.qos.restore_by_tag(tag)
    assert waiting(line) == ["b"]
    channel.client.delete(QUEUE)


@pytest.mark.parametrize("garbage", ["{", "7", "null", "{}", '{"properties": 3}', b"\xff\xfe"])
def test_garbage_among_what_is_taken_harms_no_other(line: Connection, garbage: str | bytes) -> None:
    """It is dropped with a line in the log, as garbage is that comes alone."""
    publish(line, *some(WAKE_UP, "a"))
    channel_of(line).client.lpush(QUEUE, garbage)
    publish(line, *some(OTHER, "b"))

    assert take_with_room(line, 10) == [["a", "b"]]
    assert in_redis(line) == []


def test_what_had_to_be_waited_for_is_taken_alone(line: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is behind it as a rule: to ask for more would cost every lonely message a command."""
    monkeypatch.setattr(broker, "AT_ONCE_S", 0.0)
    publish(line, *some(WAKE_UP, "a", "b"))

    assert take_with_room(line, 10, 10) == [["a"], ["b"]]


def test_where_scripts_are_not_allowed_messages_are_taken_one_by_one(line: Connection) -> None:
    """A broker may have users with few rights."""
    publish(line, *some(WAKE_UP, "a", "b"))
    client = channel_of(line).client
    client.execute_command("ACL", "SETUSER", "default", "-@scripting")
    try:
        assert take_with_room(line, 10, 10) == [["a"], ["b"]]
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+@scripting")


# --- a silent broker -------------------------------------------------------------------------------------


def test_a_command_to_a_silent_broker_ends_by_itself(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep a worker from taking messages for ever; the next command has another connection."""
    monkeypatch.setattr(redis_transport, "ANSWER_TIMEOUT_S", 0.2)
    with Proxy(redis_url) as proxy, Connection(proxy.url, transport=TRANSPORTS["redis"]) as line:
        publish(line, WAKE_UP)
        proxy.silence()
        with pytest.raises(line.connection_errors):
            publish(line, WAKE_UP)
        publish(line, WAKE_UP)
    with Connection(redis_url, transport=TRANSPORTS["redis"]) as line:
        assert waiting(line) == ["r1", "r1"]
        channel_of(line).client.delete(QUEUE)


def test_a_wait_for_a_message_that_outlives_its_own_limit_is_begun_anew(redis_url: str) -> None:
    """Redis answers within a second that there is none; a connection that is silent for longer is dropped."""
    options = {"health_check_interval": 1}
    with (
        Proxy(redis_url) as proxy,
        Connection(redis_url) as sender,
        Connection(proxy.url, transport=TRANSPORTS["redis"], transport_options=options) as line,
    ):
        taken: list[Any] = []
        hub = Hub()
        turns = hub.create_loop()
        line.register_with_event_loop(hub)
        with Consumer(
            line.default_channel, [Queue(QUEUE)], callbacks=[lambda _, message: taken.append(message)]
        ):

            def takes(count: int) -> bool:
                next(turns)
                return len(taken) >= count

            publish(sender, WAKE_UP)
            wait_for(lambda: takes(1), "the first message is taken")
            next(turns)  # it waits for the next
            proxy.silence()
            publish(sender, WAKE_UP)  # goes to the connection that is silent
            publish(sender, WAKE_UP)
            wait_for(lambda: takes(2), "the worker has connected again")
        for message in taken:
            message.ack()
        hub.close()
