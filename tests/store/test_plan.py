"""Plans: one sequence of Redis operations for threads and for event loops."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing, suppress
from typing import Any

import pytest

from openagents_worker.errors import OpenAgentsError, RedisRefused
from openagents_worker.store.client import AsyncStore, Cell, OnDisk, Plan, Store
from openagents_worker.store.codec import PLAIN
from openagents_worker.store.plan import CODEC, Commands, Emit
from tests.support.script_calls import call


@pytest.fixture
def store(redis_url: str) -> Generator[Store]:
    with closing(Store(Cell(redis_url))) as store:
        yield store


@pytest.fixture
async def astore(redis_url: str) -> AsyncGenerator[AsyncStore]:
    store = AsyncStore(Cell(redis_url))
    yield store
    await store.close()


def every_step() -> Plan[list[Any]]:
    """A plan with each kind of step. Its own steps get the answers of `other`."""
    is_plain = (yield CODEC) is PLAIN
    answers = yield Commands([("SET", "oa:looked", "1", "PX", "60000"), ("HGET", "oa:looked", "x")])
    read = yield lambda r: r.get("oa:looked")
    kind = yield call("mend_key", key="oa:looked", kind="string")
    code = ""
    try:
        yield lambda r: r.hget("oa:looked", "x")
    except RedisRefused as error:
        code = error.code
    own = yield "own"
    return [is_plain, answers[0], type(answers[1]).__name__, read, kind, code, own]


EXPECTED = [True, True, "ResponseError", "1", "SOUND", "redis.wrong_type", "own!"]


def test_a_plan_is_executed_by_a_thread(store: Store) -> None:
    """An error of a step is raised in the plan, which may handle it."""
    assert store.execute(every_step(), lambda step: f"{step}!") == EXPECTED


async def test_a_plan_is_executed_by_an_event_loop(astore: AsyncStore) -> None:
    async def other(step: str) -> str:
        return f"{step}!"

    assert await astore.execute(every_step(), other) == EXPECTED


def emitting(closed: Callable[[], None]) -> Plan[None]:
    try:
        for number in range(3):
            yield Emit([number, (yield lambda r: r.ping())])
    finally:
        closed()


def test_what_a_plan_emits_is_streamed_and_a_stream_that_is_left_closes_its_plan(store: Store) -> None:
    closed: list[bool] = []
    assert list(store.stream(emitting(lambda: closed.append(True)))) == [0, True, 1, True, 2, True]
    with closing(store.stream(emitting(lambda: closed.append(True)))) as left:
        assert next(left) == 0
    assert closed == [True, True]


async def test_an_event_loop_streams_the_same(astore: AsyncStore) -> None:
    closed: list[bool] = []
    found = [item async for item in astore.stream(emitting(lambda: closed.append(True)))]
    assert (found, closed) == ([0, True, 1, True, 2, True], [True])


def test_an_error_that_a_plan_does_not_handle_leaves_it(store: Store) -> None:
    def plan() -> Plan[None]:
        yield OnDisk(call("wake"))  # this Redis does not write to its disk

    with pytest.raises(Exception, match="appendonly"):
        store.execute(plan())


def raising_an_answer() -> Plan[None]:
    """A plan that raises the error in an answer of a pipeline, as one does that cannot handle it."""
    [answer] = yield Commands([("NOPE",)])
    raise answer


async def test_an_error_in_an_answer_of_a_pipeline_leaves_a_plan_translated(
    store: Store, astore: AsyncStore
) -> None:
    """Callers know the errors of this library only: the command line, pages and metrics."""
    with pytest.raises(RedisRefused, match="NOPE"):
        store.execute(raising_an_answer())
    with pytest.raises(RedisRefused, match="NOPE"):
        list(store.stream(raising_an_answer()))
    with pytest.raises(RedisRefused, match="NOPE"):
        await astore.execute(raising_an_answer())
    with pytest.raises(RedisRefused, match="NOPE"):
        [item async for item in astore.stream(raising_an_answer())]


def _refused(store: Store) -> list[Callable[[], Any]]:
    key = store.keys("run", "r1")
    store.use(lambda r: r.set(key, "not a hash", px=60_000))
    submit = call("submit", run_id="r1")

    def plan() -> Plan[Any]:
        return (yield lambda r: r.hget(key, "x"))

    return [
        lambda: store.run(submit),
        lambda: store.run_on_disk(submit),
        lambda: store.execute(plan()),
        lambda: list(store.stream(plan())),
    ]


@pytest.mark.parametrize("door", range(4), ids=["run", "run_on_disk", "execute", "stream"])
def test_an_error_that_leaves_a_plan_is_freed_at_once(store: Store, door: int) -> None:
    """It would keep the frames of its traceback, and with them the run that was to be written."""
    work = _refused(store)[door]
    with suppress(OpenAgentsError):
        work()  # objects created once per process are kept
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(OpenAgentsError) as raised:
            work()
        cause = raised.value.__cause__ or raised.value
        errors = [weakref.ref(raised.value), weakref.ref(cause)]
        del raised, cause
        assert [error() for error in errors] == [None, None]
    finally:
        gc.enable()
