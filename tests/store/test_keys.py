"""The table of keys: the same in Python and in Lua, and a judge of what may expire."""

from __future__ import annotations

from collections.abc import Callable, Generator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openagents_worker.store.client import Cell, Store
from openagents_worker.store.keys import (
    ALWAYS_EXPIRING,
    ANY_TYPE,
    KEYS,
    PERMANENT,
    Keys,
    KeySpec,
    encode_id,
    lua_key_functions,
    spec_of,
    ttl_violations,
)

PREFIX = "cell:{c1}"
keys = Keys(PREFIX)

ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
# What stands for something in a key, a channel pattern or a hash slot, and letters that are more than a byte
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
    """What a script makes of an expression over the functions of the table and its arguments."""
    answer: str = store.redis.eval(f"{lua_key_functions()}\nreturn {expression}", 1, PREFIX, *words)
    return answer


def holes(template: str) -> int:
    return template.count("{}")


# --- Python and Lua --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", KEYS, ids=lambda spec: spec.name)
def test_python_and_lua_make_the_same_key(store: Store, spec: KeySpec) -> None:
    """One table: a script finds what Python wrote, and the other way round."""
    for id_ in WILD:
        arguments = [id_] * holes(spec.template)

        in_lua = lua(store, f"k.{spec.name}({'ARGV[1]' if arguments else ''})", id_)

        assert in_lua == keys(spec.name, *arguments)


def test_python_and_lua_name_the_same_channels(store: Store) -> None:
    """Who watches a run or waits for notices hears what the scripts publish."""
    for id_ in WILD:
        channel = lua(store, "k.channel(ARGV[1], ARGV[2], ARGV[3])", id_, "s", "r")
        assert channel == keys.channel(id_, "s", "r")
        assert lua(store, "k.notices(ARGV[1])", id_) == keys.notices(id_)
        assert lua(store, "k.alive(ARGV[1])", id_) == keys.alive(id_)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(id_=ids)
def test_an_id_is_encoded_alike_and_stays_in_its_place(store: Store, id_: str) -> None:
    """No character of an id means anything in a key: none ends it, none is a pattern, none is a hash tag."""
    encoded = encode_id(id_)

    assert lua(store, "enc(ARGV[1])", id_) == encoded
    assert set(encoded).isdisjoint("{}*?[]:")
    assert encoded.isascii()


@given(one=ids, other=ids)
def test_two_ids_never_share_a_key(one: str, other: str) -> None:
    """Different ids have different keys, whatever kind of key it is."""
    of_one = {keys(spec.name, one) for spec in KEYS if holes(spec.template)}
    of_other = {keys(spec.name, other) for spec in KEYS if holes(spec.template)}

    assert len(of_one) == sum(holes(spec.template) for spec in KEYS)
    assert one == other or of_one.isdisjoint(of_other)


@pytest.mark.parametrize("spec", KEYS, ids=lambda spec: spec.name)
def test_a_key_says_what_it_is(spec: KeySpec) -> None:
    """From a key back to its line of the table and to the id in it."""
    for id_ in WILD:
        arguments = [id_] * holes(spec.template)

        known = spec_of(keys(spec.name, *arguments), PREFIX)

        assert known == (spec, encode_id(id_) if arguments else "")


@pytest.mark.parametrize(
    "key", ["run", "run:a:b", "sess:s:other", "worker:w", "workers:w", "queue", "xrun:a"]
)
def test_a_key_that_is_none_of_ours_is_nobodys(key: str) -> None:
    """Nothing is taken for a kind that it only resembles."""
    assert spec_of(f"{PREFIX}:{key}", PREFIX) is None


# --- what may expire -------------------------------------------------------------------------------------


def written(store: Store) -> dict[str, str]:
    """A cell that breaks no rule: every kind of key, once of something live and once of something over."""
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


def test_a_cell_that_keeps_the_rules_has_no_violations(store: Store) -> None:
    """What is live has no TTL, what is over has one, what is permanent needs none."""
    of = written(store)

    assert ttl_violations(store.cell.url, PREFIX) == []
    assert {name.split()[0] for name in of} == {spec.name for spec in KEYS}


LIVE = [
    f"{spec.name} {'w1' if spec.name.startswith('worker_') else 'live'}"
    for spec in KEYS
    if holes(spec.template) and spec.name not in PERMANENT | ALWAYS_EXPIRING
]


@pytest.mark.parametrize("name", [*LIVE, "workers", "agents", "due", "sent live"])
def test_something_live_that_would_expire_is_found(store: Store, name: str) -> None:
    """A run parked for longer than its TTL must not vanish, and block its session for ever."""
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
def test_something_over_that_would_stay_is_found(store: Store, name: str) -> None:
    """Redis must not fill up with what nobody needs."""
    key = written(store)[name]
    store.redis.persist(key)

    [violation] = ttl_violations(store.cell.url, PREFIX)

    assert violation.startswith(f"{key}: never expires, but ")


@pytest.mark.parametrize("kind", ["worker_runs", "worker_box", "worker_suspect"])
def test_what_a_dead_worker_left_behind_is_found(store: Store, kind: str) -> None:
    """A worker's keys end with its lease."""
    key = written(store)[f"{kind} w1"]
    store.redis.zrem(keys("workers"), "w1")

    assert [text for text in ttl_violations(store.cell.url, PREFIX) if text.startswith(f"{key}: never")]


def test_a_session_is_live_by_its_holder_or_by_its_queue(store: Store) -> None:
    """Both count: while either is there, nothing of the session may expire."""
    store.redis.rpush(keys("transcript", "s"), "1")
    store.redis.zadd(keys("session_queue", "s"), {"r": 1})
    assert ttl_violations(store.cell.url, PREFIX) == []

    store.redis.delete(keys("session_queue", "s"))
    assert len(ttl_violations(store.cell.url, PREFIX)) == 1

    store.redis.hset(keys("session", "s"), "holder", "r")
    assert ttl_violations(store.cell.url, PREFIX) == []


def test_a_key_that_stands_in_no_table_is_found(store: Store) -> None:
    """Whoever adds a key adds a line to the table. Other people's keys are not ours to judge."""
    store.redis.set(f"{PREFIX}:secret", "1")
    store.redis.set("celery", "1")

    assert ttl_violations(store.cell.url, PREFIX) == [f"{PREFIX}:secret: not a key of this library"]


def test_a_url_with_another_prefix_sees_nothing_of_this_cell(store: Store) -> None:
    """Cells that share a Redis do not judge each other."""
    store.redis.set(f"{PREFIX}:secret", "1")

    assert ttl_violations(store.cell.url, "oa") == []
