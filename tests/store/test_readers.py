"""Readers of many items: an unreadable item is left out and named; all others are read."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

from openagents_worker.errors import RedisWrongType
from openagents_worker.store.approvals import list_approvals
from openagents_worker.store.client import AsyncStore, Cell, Store
from openagents_worker.store.dead_letters import parse_entries, read_put_aside
from openagents_worker.store.fleet import read_fleet, read_workers
from openagents_worker.store.keys import KEYS, Keys
from openagents_worker.store.listing import RunFilter, list_problems, list_runs, list_sessions
from openagents_worker.store.records import read_record, read_states
from openagents_worker.store.row_reads import ReadBy
from openagents_worker.store.run_figures import newest_figures
from openagents_worker.store.sessions import read_session
from openagents_worker.store.stored_events import history
from openagents_worker.store.watch import watch
from tests.store.test_broken_records import NONSENSE
from tests.store.test_wrong_types import WRITERS
from tests.support.script_calls import call

keys = Keys("oa")
CARD = '{"host":"h","pid":1,"queues":["q"],"agents":{"a":"1"},"max_runs":1,"version":"1"}'


@pytest.fixture
def store(redis_url: str) -> Generator[Store]:
    """Two workers and two runs in separate sessions. Tests break the first of each."""
    store = Store(Cell(redis_url))
    for n in ("1", "2"):
        store.run(
            call("register", incarnation=f"w{n}", info=CARD, agents=["a", '{"queue":null,"def_hash":"1"}'])
        )
        store.run(call("submit", run_id=f"r{n}", session_id=f"s{n}", request=_request(n), lists=["tenant=x"]))
    yield store
    store.redis.flushall()
    store.close()


def _request(n: str) -> str:
    return f'{{"agent_id":"a","session_id":"s{n}","input_text":"","run_id":"r{n}"}}'


def runs(store: Store, **filters: Any) -> Any:
    return store.execute(list_runs(keys, RunFilter.of(filters), limit=10, cursor=None))


def readable(store: Store) -> None:
    """Every reader of many items shows the second run, its session, its worker and its state."""
    assert "r2" in [record.run_id for record in runs(store)]
    assert "r2" in [run.record.run_id for run in store.execute(newest_figures(keys, 10))]
    for read_by in ReadBy:
        sessions = store.execute(list_sessions(keys, limit=10, cursor=None, read_by=read_by))
        assert "s2" in [one.session_id for one in sessions]
        assert "w2" in [worker.incarnation for worker in store.execute(read_workers(keys, read_by))]
        assert "q" in [queue.name for queue in store.execute(read_fleet(keys, "q", read_by=read_by)).queues]
        assert store.execute(list_approvals(keys, {}, limit=10, cursor=None, read_by=read_by)) is not None
    assert read_states(store, ["r1", "r2"])["r2"] == "queued"
    assert store.execute(list_problems(keys)) is not None
    assert store.execute(read_put_aside(keys)) is not None
    assert read_record(store, "r2").run_id == "r2"
    assert read_session(store, "s2").holder == "r2"
    assert [event.name for event in store.execute(history(keys, "r2"))] == ["run.queued"]


OF_THE_FIRST = {
    "run": "r1", "facts": "r1", "events": "r1", "journal": "r1", "session": "s1", "session_queue": "s1",
    "transcript": "s1", "artifacts": "s1", "session_state": "s1", "worker_runs": "w1", "worker_box": "w1",
    "sent": "other",
}  # fmt: skip
CASES = [
    (spec.name, kind)
    for spec in KEYS
    if spec.name in OF_THE_FIRST or ("{}" not in spec.template and spec.name != "workers")
    for kind in WRITERS
    if kind != spec.type
]


@pytest.mark.share(of=3)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_key_of_a_wrong_type_does_not_stop_a_reader_of_many_items(
    store: Store, name: str, kind: str
) -> None:
    """A key of one item, and a key that exists once in a cell."""
    key = keys(name, *([OF_THE_FIRST[name]] if name in OF_THE_FIRST else []))
    store.redis.delete(key)
    WRITERS[kind](store.redis, key)

    readable(store)

    named = {problem.key for problem in store.execute(list_problems(keys))}
    assert key in named or name not in ("run", "due", "agents", "fleet", "sent_again")


@pytest.mark.parametrize("value", NONSENSE)
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("run r1", "state"), ("run r1", "format"), ("run r1", "created"), ("run r1", "request"),
        ("run r1", "result"), ("run r1", "usage"), ("run r1", "last_error_details"), ("run r1", "agent"),
        ("session s1", "holder"), ("session s1", "format"), ("fleet", "w1"), ("fleet_lag", "w1"),
        ("agents", "a"), ("agents", "b"), ("sent_again", "q"),
    ],
)  # fmt: skip
def test_an_invalid_value_does_not_stop_a_reader_of_many_items(
    store: Store, name: str, field: str, value: Any
) -> None:
    """A record with an unreadable field is a problem with a code."""
    kind, *ids = name.split()
    store.redis.hset(keys(kind, *ids), field, value)

    readable(store)


@pytest.mark.parametrize("value", [*NONSENSE, '{"at":1,"parts":[1]}', '{"at":"x","parts":[{"part":1}]}',
    '{"at":1e300,"parts":[{"part":"a","state":"late","age_ms":1e300}]}', '{"at":[],"parts":{}}'])  # fmt: skip
def test_invalid_health_of_parts_does_not_hide_the_worker(store: Store, value: Any) -> None:
    store.redis.set(keys("worker_parts", "w2"), value, px=60_000)

    readable(store)
    assert "w2" in [worker.incarnation for worker in store.execute(read_workers(keys))]


def test_health_of_a_newer_worker_is_shown(store: Store) -> None:
    """A state that this version does not know, and more fields than it knows."""
    text = (
        '{"at":60000,"parts":[{"part":"a","state":"slow","age_ms":1000,"failures":2,"code":"x.y","new":[]}]}'
    )
    store.redis.set(keys("worker_parts", "w2"), text, px=60_000)

    (found,) = [one.parts for one in store.execute(read_workers(keys)) if one.incarnation == "w2"]
    (part,) = found

    assert (part.part, part.state, part.failures, part.code) == ("a", "slow", 2, "x.y")
    assert part.is_problem
    assert part.since.timestamp() == 59


@pytest.mark.parametrize("score", ["-inf", "inf", 1e17, -5])
@pytest.mark.parametrize(
    "name", ["index all", "index sessions", "index tenant=x", "workers", "sent q", "due"]
)
def test_an_invalid_score_does_not_stop_a_reader_of_many_items(
    store: Store, name: str, score: float | str
) -> None:
    """Times before and after all valid times."""
    kind, *ids = name.split()
    for member in ("nobody", b"\xff\xfe", ""):
        store.redis.execute_command("ZADD", keys(kind, *ids), score, member)

    readable(store)
    assert "r2" in [record.run_id for record in runs(store, tenant="x")]


def test_reading_one_unreadable_run_raises_an_error_with_its_key(store: Store) -> None:
    """Readers of other runs are not affected."""
    store.redis.set(keys("run", "r1"), "x", ex=60)

    for ask in (lambda: read_record(store, "r1"), lambda: store.run(call("submit", run_id="r1"))):
        with pytest.raises(RedisWrongType) as error:
            ask()
        assert (error.value.code, error.value.key) == ("redis.wrong_type", keys("run", "r1"))


async def test_an_async_reader_names_the_key_too(redis_url: str) -> None:
    """In a single command and in a pipeline."""
    store = AsyncStore(Cell(redis_url))
    await store.use(lambda r: r.set("oa:run:r1", "x", ex=60))

    async def in_a_pipeline(client: Any) -> Any:
        async with client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hgetall("oa:run:r1")
            return await pipe.execute()

    questions: list[Callable[[Any], Any]] = [lambda r: r.hgetall("oa:run:r1"), in_a_pipeline]
    for question in questions:
        with pytest.raises(RedisWrongType) as error:
            await store.ask(question)
        assert error.value.key == "oa:run:r1"
    await store.close()


def test_invalid_dead_letters_are_left_out() -> None:
    """Another program may have written to the list."""
    good = '{"at_us":1,"key":"k","code":"c","what":"w"}'

    found = parse_entries(
        ["", "7", "null", "{}", '{"at_us":"x"}', '{"at_us":1e400,"key":1}', "[" * 9999, good]
    )

    assert [entry.key for entry in found] == ["k"]


def test_foreign_stream_entries_are_left_out(store: Store) -> None:
    """The other events of the run are shown, with a gap in place of an unreadable one."""
    store.redis.xadd(keys("events", "r1"), {"x": "y"}, id="2-0")
    store.redis.hset(keys("run", "r1"), "seq", 2)
    store.run(call("cancel"))

    shown = [event.name for event in watch(store, "r1")]

    assert shown == ["run.queued", "events.gap", "run.cancelled", "session.run.completed"]
    assert "events.gap" not in [event.name for event in store.execute(history(keys, "r1"))]
