"""Names of keys, keys with another type, and elements that could stop a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openagents_worker.store.ttl import PERMANENT
from tests.hostile.matrix import ELEMENT, KEY, TYPE
from tests.hostile.table import Attack, Case, cases, hostile
from tests.hostile.world import World
from tests.producer.test_broken_items import NOT_MESSAGES
from tests.support.deployment import PATIENCE_S
from tests.support.waiting import wait_for
from tests.unit.test_queue_names import INVALID

OURS = [name for name in INVALID if name.startswith("oa:")]
NAMES = [name for name in INVALID if name and name not in OURS] + OURS[:6]


def ascii_of(name: str) -> str:
    return ascii(name if len(name) < 40 else f"{name[:20]} and more")


def linked(name: str, how: str) -> dict[str, Any]:
    task = {"task": "shop.mail", "args": [], "kwargs": {}, "options": {"queue": name}}
    return {how: task if how == "link" else [task]}


NAME_CASES = [
    *cases("request", {ascii_of(name): ({"queue": name}, "request.invalid") for name in NAMES}),
    *cases("options", {ascii_of(name): ({"queue": name}, "request.invalid") for name in NAMES[::2]}),
    *cases(
        "options",
        {
            f"{how} to {ascii_of(name)}": (linked(name, how), "request.invalid")
            for how, names in (("link", NAMES[:12]), ("chain", NAMES[12:24]))
            for name in names
        },
    ),
    *cases(
        "agents_file",
        {
            ascii_of(name): ({"queue": name}, ("config.validation", "config.load"))
            for name in NAMES
            if not name.startswith("oa")  # the file does not know the prefix: the worker's start does
        },
    ),
]


@hostile(KEY, NAME_CASES)
def test_no_name_becomes_a_key(case: Case, attack: Attack) -> None:
    attack(case)


# --- keys of another type --------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Any, str], object]] = {
    "string": lambda redis, key: redis.set(key, "foreign"),
    "list": lambda redis, key: redis.rpush(key, "foreign"),
    "hash": lambda redis, key: redis.hset(key, "foreign", "foreign"),
    "zset": lambda redis, key: redis.zadd(key, {"foreign": 1}),
}


def becomes(name: str, kind: str, *ids: str) -> Callable[[Any, Any, str], object]:
    """Replace a key of the waiting run, of its session or of the cell by another value."""

    def alter(redis: Any, keys: Any, run_id: str) -> None:
        session = redis.hget(keys("run", run_id), "session")
        key = keys(name, *({"run": run_id, "session": session}.get(id_, id_) for id_ in ids))
        with redis.pipeline() as at_once:
            at_once.delete(key)
            WRITERS[kind](at_once, key)
            if name not in PERMANENT:
                at_once.expire(key, 600)
            at_once.execute()

    return alter


TYPE_CASES = cases(
    "record",
    {
        **{
            f"{name} is a {kind}": (becomes(name, kind, id_), "redis.wrong_type")
            for name, id_, kind in (
                ("journal", "run", "string"), ("journal", "run", "hash"), ("journal", "run", "zset"),
                ("facts", "run", "string"), ("facts", "run", "list"), ("facts", "run", "zset"),
            )
        },
        **{
            f"{name} is a {kind}": (becomes(name, kind, *ids), "completed")
            for name, kind, *ids in (
                ("events", "string", "run"), ("events", "list", "run"), ("events", "hash", "run"),
                ("reply", "string", "run"), ("reply", "list", "run"),
                ("due", "list"), ("due", "string"), ("due", "hash"),
                ("index", "list", "all"), ("index", "string", "sessions"), ("indexes", "list"),
                ("agents", "list"), ("fleet", "list"), ("fleet_lag", "string"), ("sent_again", "list"),
                ("silent", "list"), ("watched", "string"), ("looked", "list"), ("aside", "string"),
                ("served", "list"), ("aside_said", "list"), ("lost_leases", "hash"),
            )
        },
    },
)  # fmt: skip


@hostile(TYPE, TYPE_CASES)
def test_a_key_of_another_type_stops_no_other_run(case: Case, attack: Attack) -> None:
    attack(case)


# --- elements that stop a loop ---------------------------------------------------------------------------


def sets(field: str, value: str | bytes) -> Callable[[Any, Any, str], object]:
    return lambda redis, keys, run_id: redis.hset(keys("run", run_id), field, value)


def puts(where: str, member: str | bytes, score: float | str) -> Callable[[Any, Any, str], object]:
    def alter(redis: Any, keys: Any, run_id: str) -> None:
        names = where.split()
        redis.execute_command("ZADD", keys(names[0], *names[1:]), score, member)

    return alter


def _bytes(item: str | bytes) -> bytes:
    return item if isinstance(item, bytes) else item.encode()


def from_elsewhere(**info: Any) -> Callable[[dict[str, Any]], Any]:
    def alter(envelope: dict[str, Any]) -> Any:
        envelope["properties"]["delivery_info"].update(info)
        return envelope

    return alter


COUNTS = ("seq", "active_ms", "retries_in_all", "suspicion", "stuck", "due", "expires", "emit_no", "claimed")
SHOWN = ("seq", "retries_in_all")
NONSENSE = ("", "x", "9" * 30, b"\xff")
ELEMENT_CASES = [
    *cases("message", {name: (_bytes(item), "gone") for name, item in NOT_MESSAGES.items()}),
    *cases(
        "message",
        {
            f"from {where!r}": (
                from_elsewhere(routing_key=where),
                ("gone", "completed", "request.invalid"),
            )
            for where in ("oa:due", "unacked", 7, None, [])
        },
    ),
    *cases(
        "record",
        {
            f"{field} is {value!r}": (
                sets(field, value),
                ("completed", "record.unreadable") if field in SHOWN else "completed",
            )  # who watches meanwhile is told that it cannot be read
            for field in COUNTS
            for value in NONSENSE
        },
    ),
    *cases(
        "record",
        {
            f"canvas is {value!r}": (sets("canvas", value), "record.unreadable" if value else "completed")
            for value in NONSENSE
        },
    ),
    *cases(
        "record",
        {
            f"{where} has {member!r} at {score}": (puts(where, member, score), "completed")
            for where in ("due", "index all", "sent agents", "workers")
            for member, score in (("nobody", 0), (b"\xff\xfe", "-inf"))
        },
    ),
]


@hostile(ELEMENT, ELEMENT_CASES)
def test_one_element_stops_no_loop(case: Case, attack: Attack) -> None:
    attack(case)


def test_what_was_put_aside_is_listed(world: World) -> None:
    """It can be read unchanged."""
    client = world.installation.client
    client.store.redis.lpush("agents", "{")
    world.next_run()

    found = {(entry.key, entry.code, entry.item) for entry in client.put_aside()}

    assert ("agents", "message.unreadable", "{") in found


UNREADABLE = ["", "{", "[]", "null", '{"stop_reason": 7}', "\xff", "[" * 5000, "9" * 5000]


def test_an_end_that_cannot_be_read_is_told_once(world: World) -> None:
    """Celery is notified once that the run has failed. Otherwise the notification would be repeated."""
    redis, keys = world.installation.client.store.redis, world.installation.client.store.keys
    ids = [f"unreadable-{number}" for number in range(len(UNREADABLE))]
    world.altered.update(ids)
    for run_id, text in zip(ids, UNREADABLE, strict=True):
        world.submit(run_id=run_id).wait(PATIENCE_S)
        wait_for(lambda run_id=run_id: not redis.hexists(keys("run", run_id), "untold"), "it has been told")
        redis.hset(keys("run", run_id), mapping={"result": text, "untold": 1, "tellings": 0})
        redis.zadd(keys("sent", "agents"), {run_id: 1})

    wait_for(lambda: not redis.zcard(keys("sent", "agents")), "all have been told")

    assert not any(redis.hexists(keys("run", run_id), "untold") for run_id in ids)
    world.next_run()
