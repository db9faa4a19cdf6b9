"""The table of keys: Python and Lua make the same keys, and keys with a wrong TTL are found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openagents_worker.store.client import Cell, Store
from openagents_worker.store.keys import ANY_TYPE, KEYS, Keys, KeySpec, encode_id, spec_of
from openagents_worker.store.lua_keys import lua_key_functions
from openagents_worker.store.ttl import ALWAYS_EXPIRING, PERMANENT, ttl_violations

PREFIX = "cell:{c1}"
keys = Keys(PREFIX)

ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
# Characters with a meaning in a key, a channel pattern or a hash slot, and letters of more than one byte
WILD = [
    "{r}",
    "*",
    "?",
    "[a]",
    "a:b",
    "100%",
    "%3A",
    "a b\n",
    "läuft",
    "漢字",
    "🙂",
    "..",
    "~._-",
    "queue",
    "x:events",
]


@pytest.fixture
def store(redis_url: str) -> Generator[Store]:
    store = Store(Cell(redis_url, PREFIX))
    yield store
    store.redis.flushall()
    store.close()


def lua(store: Store, expression: str, *words: str) -> str:
    """The result of a Lua expression over the key functions and its arguments."""
    answer: str = store.redis.eval(f"{lua_key_functions()}\nreturn {expression}", 1, PREFIX, *words)
    return answer


def holes(template: str) -> int:
    return template.count("{}")


# --- Python and Lua --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", KEYS, ids=lambda spec: spec.name)
def test_python_and_lua_make_the_same_key(store: Store, spec: KeySpec) -> None:
    """There is one table: a script finds what Python wrote, and vice versa."""
    for id_ in WILD:
        arguments = [id_] * holes(spec.template)

        in_lua = lua(store, f"k.{spec.name}({'ARGV[1]' if arguments else ''})", id_)

        assert in_lua == keys(spec.name, *arguments)


def test_python_and_lua_name_the_same_channels(store: Store) -> None:
    """Watchers and workers get what the scripts publish."""
    for id_ in WILD:
        channel = lua(store, "k.channel(ARGV[1], ARGV[2], ARGV[3])", id_, "s", "r")
        assert channel == keys.channel(id_, "s", "r")
        assert lua(store, "k.notices(ARGV[1])", id_) == keys.notices(id_)
        assert lua(store, "k.alive(ARGV[1])", id_) == keys.alive(id_)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(id_=ids)
def test_an_id_cannot_change_the_structure_of_a_key(store: Store, id_: str) -> None:
    """No character of an id has a meaning in a key: none ends it, none is a pattern, none is a hash tag."""
    encoded = encode_id(id_)

    assert lua(store, "enc(ARGV[1])", id_) == encoded
    assert set(encoded).isdisjoint("{}*?[]:")
    assert encoded.isascii()


@given(one=ids, other=ids)
def test_two_ids_never_share_a_key(one: str, other: str) -> None:
    """Different ids have different keys, for every kind of key."""
    of_one = {keys(spec.name, one) for spec in KEYS if holes(spec.template)}
    of_other = {keys(spec.name, other) for spec in KEYS if holes(spec.template)}

    assert len(of_one) == sum(holes(spec.template) for spec in KEYS)
    assert one == other or of_one.isdisjoint(of_other)


@pytest.mark.parametrize("spec", KEYS, ids=lambda spec: spec.name)
def test_the_kind_and_the_id_of_a_key_are_found(spec: KeySpec) -> None:
    """From a key back to its row of the table and to the id in it."""
    for id_ in WILD:
        arguments = [id_] * holes(spec.template)

        known = spec_of(keys(spec.name, *arguments), PREFIX)

        assert known == (spec, encode_id(id_) if arguments else "")


@pytest.mark.parametrize(
    "key", ["run", "run:a:b", "sess:s:other", "worker:w", "workers:w", "queue", "xrun:a"]
)
def test_a_foreign_key_has_no_kind(key: str) -> None:
    """A key that only resembles a kind is not accepted."""
    assert spec_of(f"{PREFIX}:{key}", PREFIX) is None


# --- keys with a TTL -------------------------------------------------------------------------------------


def written(store: Store) -> dict[str, str]:
    """A valid cell: every kind of key, once of a live owner and once of an owner that is over."""
    redis, of = store.redis, {}
    redis.zadd(keys("workers"), {"w1": 1})
    redis.hset(keys("run", "live"), "state", "running")
    redis.hset(keys("session", "live"), "holder", "live")
    redis.hset(keys("run", "over"), "state", "completed")
    redis.hset(keys("session", "over"), "version", 1)
    writers: dict[str, Callable[[str], object]] = {
        "hash": lambda key: redis.hset(key, "field", "1"),
        "list": lambda key: redis.rpush(key, "1"),
        "set": lambda key: redis.sadd(key, "1"),
        "zset": lambda key: redis.zadd(key, {"1": 1}),
        "stream": lambda key: redis.xadd(key, {"e": "1"}),
        "string": lambda key: redis.set(key, "1"),
        ANY_TYPE: lambda key: redis.set(key, "1"),
    }
    for spec in KEYS:
        lives = ["w1"] if spec.name.startswith("worker_") else ["live", "over"]
        for id_ in lives if holes(spec.template) else [""]:
            if spec.name == "session_queue" and id_ == "over":
                continue  # a session with a queue is live
            key = keys(spec.name, *([id_] if id_ else []))
            writers[spec.type](key)
            of[f"{spec.name} {id_}".strip()] = key
            if (id_ == "over" and spec.name not in PERMANENT) or spec.name in ALWAYS_EXPIRING:
                redis.expire(key, 1000)
    return of


def test_a_valid_cell_has_no_violations(store: Store) -> None:
    """Keys of live owners have no TTL, keys of ended ones have one, permanent keys need none."""
    of = written(store)

    assert ttl_violations(store.cell.url, PREFIX) == []
    assert {name.split()[0] for name in of} == {spec.name for spec in KEYS}


LIVE = [
    f"{spec.name} {'w1' if spec.name.startswith('worker_') else 'live'}"
    for spec in KEYS
    if holes(spec.template) and spec.name not in PERMANENT | ALWAYS_EXPIRING
]


@pytest.mark.parametrize("name", [*LIVE, "workers", "agents", "due", "sent live"])
def test_a_live_key_that_would_expire_is_found(store: Store, name: str) -> None:
    """A run that waits longer than its TTL must not disappear and block its session for ever."""
    key = written(store)[name]
    store.redis.expire(key, 1000)

    [violation] = ttl_violations(store.cell.url, PREFIX)

    assert violation.startswith(f"{key}: would expire in ")


@pytest.mark.parametrize(
    "name",
    [
        "run over",
        "facts over",
        "events over",
        "journal over",
        "session over",
        "transcript over",
        "reply live",
    ],
)
@pytest.mark.defect("D08")
def test_a_key_of_an_ended_owner_without_a_ttl_is_found(store: Store, name: str) -> None:
    """Redis must not fill up with unused keys."""
    key = written(store)[name]
    store.redis.persist(key)

    [violation] = ttl_violations(store.cell.url, PREFIX)

    assert violation.startswith(f"{key}: never expires, but ")


@pytest.mark.parametrize("kind", ["worker_runs", "worker_box", "worker_suspect"])
def test_a_key_of_a_dead_worker_is_found(store: Store, kind: str) -> None:
    """The keys of a worker are deleted with its lease."""
    key = written(store)[f"{kind} w1"]
    store.redis.zrem(keys("workers"), "w1")

    assert [text for text in ttl_violations(store.cell.url, PREFIX) if text.startswith(f"{key}: never")]


def test_a_session_with_a_holder_or_a_queue_is_live(store: Store) -> None:
    """As long as it has one of them, nothing of the session may expire."""
    store.redis.rpush(keys("transcript", "s"), "1")
    store.redis.zadd(keys("session_queue", "s"), {"r": 1})
    assert ttl_violations(store.cell.url, PREFIX) == []

    store.redis.delete(keys("session_queue", "s"))
    assert len(ttl_violations(store.cell.url, PREFIX)) == 1

    store.redis.hset(keys("session", "s"), "holder", "r")
    assert ttl_violations(store.cell.url, PREFIX) == []


def test_a_run_that_ends_during_the_scan_is_no_violation(store: Store) -> None:
    """The TTL of a key and the state of its run are read at one moment."""
    key = written(store)["run live"]
    stop = threading.Event()

    def end_and_begin() -> None:
        with redis.Redis.from_url(store.cell.url) as client:
            while not stop.is_set():
                client.pipeline().hset(key, "state", "completed").pexpire(key, 100_000).execute()
                client.pipeline().hset(key, "state", "running").persist(key).execute()

    thread = threading.Thread(target=end_and_begin)
    thread.start()
    try:
        found = [text for _ in range(100) for text in ttl_violations(store.cell.url, PREFIX)]
    finally:
        stop.set()
        thread.join()
    assert [text for text in found if text.startswith(f"{key}: ")] == []


def test_a_key_that_is_not_in_the_table_is_found(store: Store) -> None:
    """A new key needs a row in the table. Keys of other programs are not checked."""
    store.redis.set(f"{PREFIX}:secret", "1")
    store.redis.set("celery", "1")

    assert ttl_violations(store.cell.url, PREFIX) == [f"{PREFIX}:secret: not a key of this library"]


def test_cells_with_another_prefix_are_not_checked(store: Store) -> None:
    """Cells that share a Redis do not check each other."""
    store.redis.set(f"{PREFIX}:secret", "1")

    assert ttl_violations(store.cell.url, "oa") == []
