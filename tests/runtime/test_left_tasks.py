"""A run that ends by itself and has left tasks: they stop before the next run of the session begins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from openagents_worker import Agent, RunContext
from openagents_worker.models import RunState
from tests.runtime import plugins
from tests.runtime.test_replay import executed_until, patterned
from tests.runtime.test_stop import worker
from tests.support.runner import Process, agent, scripted
from tests.support.waiting import await_for

LOG: list[str] = []
GATES: dict[str, asyncio.Event] = {}
TASKS: list[asyncio.Task[Any]] = []
"""Strong references, as a program keeps them that does not forget its tasks."""


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    LOG.clear()
    TASKS.clear()
    GATES.update({name: asyncio.Event() for name in ("pay", "let go")})


def start(work: Awaitable[Any]) -> None:
    TASKS.append(asyncio.ensure_future(work))
    TASKS[-1].add_done_callback(lambda done: done.cancelled() or done.exception())


async def pay(who: str) -> str:
    LOG.append(f"{who} begins")
    if who == "refused":
        raise ValueError(who)
    await GATES["pay"].wait()
    LOG.append(f"{who} has paid")
    return who


async def look() -> str:
    LOG.append("look")
    await asyncio.Event().wait()
    return "seen"


def shop(program: Callable[[RunContext], Awaitable[Any]]) -> Agent:
    async def pattern(context: RunContext) -> Any:
        return await program(context)

    return Agent("a", pattern=pattern, llm=scripted({"text": "hello"}))


async def outcomes(p: Process) -> list[tuple[str, Any]]:
    return [(each["name"], each["outcome"]) for each in (await p.journal())[1:]]


async def claimable(p: Process) -> str:
    return (await p.execute("r2")).reason


async def test_a_payment_beside_a_failed_one_is_recorded_before_its_run_fails(redis_url: str) -> None:
    """Nobody has to be asked about it when the run is resumed. The next run of the session waits for it.

    No further call of that branch begins.
    """

    async def program(context: RunContext) -> None:
        recorded = context.recorded(pay, idempotent=False)

        async def branch() -> None:
            await recorded("slow")
            LOG.append("the branch goes on")
            await recorded("another")

        async def refused() -> None:
            await await_for(lambda: LOG == ["slow begins"], "the slow payment begins")
            await recorded("refused")

        await asyncio.gather(branch(), refused())

    async with worker(redis_url, shop(program), agent("b")) as p:
        await p.submit()
        await p.submit("r2", agent_id="b")
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: "refused begins" in LOG, "one payment is refused")

        async def both_recorded_or_failed() -> bool:
            return len(await p.journal()) > 1

        await await_for(both_recorded_or_failed, "the refusal is recorded")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not executing.done()
        assert await claimable(p) == "waiting"
        GATES["pay"].set()
        await executing

        assert (await p.record()).state is RunState.FAILED
        assert await outcomes(p) == [("pay", (await outcomes(p))[0][1]), ("pay", {"ok": "slow"})]
        assert LOG == ["slow begins", "refused begins", "slow has paid", "the branch goes on"]
        names = await p.store.redis.hkeys(p.store.keys("facts", "r1"))
        assert [name for name in names if name.startswith("intent:")] == []
        assert (await p.event_names())[-2:] == ["run.failed", "session.run.completed"]
        await p.execute("r2")
        assert (await p.record("r2")).state is RunState.COMPLETED


async def test_tasks_that_a_completed_run_leaves_are_cancelled(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Their clean-up ends first, as `asyncio.run` does it. Their calls are recorded as cancelled."""

    async def program(context: RunContext) -> str:
        async def tick() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                for _ in range(20):
                    await asyncio.sleep(0)
                LOG.append("cleaned up")

        start(tick())
        start(context.step("look", look))
        await await_for(lambda: LOG == ["look"], "the step begins")
        return "done"

    async with worker(redis_url, shop(program)) as p:
        record = await p.run()

        assert record.state is RunState.COMPLETED
        assert all(task.done() for task in TASKS)
        assert LOG == ["look", "cleaned up"]
        assert await outcomes(p) == [("look", {"cancelled": True})]
        [line] = [each.getMessage() for each in caplog.records if "run.tasks_left" in each.getMessage()]
        assert "run_id=r1" in line


async def test_a_left_task_that_swallows_its_cancellation_is_named(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run ends and the process goes on: its other runs shall not be recovered for a task of this one."""

    async def program(context: RunContext) -> str:
        async def stays() -> None:
            while not GATES["let go"].is_set():
                with suppress(asyncio.CancelledError):
                    await GATES["let go"].wait()

        start(stays())
        await asyncio.sleep(0)
        return "done"

    async with worker(redis_url, shop(program), OPENAGENTS_STOP_GRACE_S="0.1") as p:
        await p.submit()
        await p.execute()
        GATES["let go"].set()
        await asyncio.wait(TASKS)

        assert p.left == []
        assert (await p.record()).state is RunState.COMPLETED
        [line] = [each.getMessage() for each in caplog.records if "run.code_left" in each.getMessage()]
        assert "run_id=r1" in line


async def test_children_that_a_run_leaves_are_cancelled_but_those_in_the_background(redis_url: str) -> None:
    async def program(context: RunContext) -> str:
        await context.delegate("b", "one", background=True)
        start(context.delegate("b", "two"))
        await await_for(lambda: len(p.wakes) == 2, "the second child exists")
        return "done"

    async with worker(redis_url, shop(program), agent("b")) as p:
        assert (await p.run()).state is RunState.COMPLETED
        ids = await p.store.redis.zrange(p.store.keys("index", "parent=r1"), 0, -1)
        states = {(each := await p.record(id_)).request.input_text: each.state for id_ in ids}  # type: ignore[union-attr]
        assert states == {"one": RunState.QUEUED, "two": RunState.CANCELLED}


async def test_a_thread_of_a_left_task_ends_before_its_run(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread cannot be stopped: the run keeps its session meanwhile."""
    blocking = {"id": "blocking", "impl": "tests.runtime.plugins.block_a_thread"}
    left = {**patterned("LeavesACall"), "tools": [blocking]}
    plugins.Blocking.free.clear()
    async with worker(redis_url, left, agent("b")) as p:
        await p.submit()
        await p.submit("r2", agent_id="b")
        executing = await executed_until(p, lambda: plugins.LOG == [("blocked",), ("ends",)], "it ends")
        await await_for(lambda: "run.tasks_left" in caplog.text, "the task is cancelled")
        for _ in range(20):
            await asyncio.sleep(0)
        assert not executing.done()
        assert await claimable(p) == "waiting"
        plugins.Blocking.free.set()
        await executing
        assert plugins.LOG[-1] == ("freed",)
        assert (await p.record()).state is RunState.COMPLETED
