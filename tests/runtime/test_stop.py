"""Once a run is suspended or has ended, none of its code executes in the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from openagents_worker import Agent
from openagents_worker.models import RunState, StopReason
from openagents_worker.runtime.latch import Latch, LatchReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.runtime.user_code import RunCode, current_run
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.tools.offload import TrackedThreads
from openagents_worker.worker.loop_thread import _Task
from tests.runtime import plugins
from tests.runtime.test_endings import error_of
from tests.runtime.test_replay import executed_until, patterned, tool
from tests.support.runner import Process, agent, process
from tests.support.waiting import await_for, wait_for

BLOCKING = {"id": "blocking", "impl": "tests.runtime.plugins.Blocking"}
BLOCK_A_THREAD = {"id": "blocking", "impl": "tests.runtime.plugins.block_a_thread"}
STOPS = ["hand-over", "cancelled", "max_duration", "soft time limit", "hard time limit", "fenced"]


@pytest.fixture(autouse=True)
def _free_threads() -> Generator[None]:
    plugins.Blocking.free.clear()
    yield
    plugins.Blocking.free.set()
    started = [entry for entry in plugins.LOG if entry == ("blocked",)]
    wait_for(lambda: plugins.LOG.count(("freed",)) == len(started), "no thread is left blocked")


@asynccontextmanager
async def worker(redis_url: str, *agents: dict[str, Any] | Agent, **env: str) -> AsyncIterator[Process]:
    """A process on a loop like that of a worker: it tracks the tasks and threads of runs."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(_Task.make)  # type: ignore[arg-type]
    threads = TrackedThreads()
    loop.set_default_executor(threads)
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, **env})
    async with process(redis_url, *agents, settings=settings) as p:
        yield p
        plugins.Blocking.free.set()  # closing the loop waits for its threads


async def stopped(p: Process, how: str, executing: asyncio.Task[Any]) -> None:
    """Stop the run in this way, and wait until its attempt has ended."""
    match how:
        case "hand-over":
            p.runner.latch("r1", LatchReason.HANDOVER)
            await p.runner.hurry_all()
        case "cancelled":
            p.runner.latch("r1", LatchReason.CANCELLED)
        case "soft time limit":
            p.runner.interrupt("r1", SoftTimeLimitExceeded(1))
        case "hard time limit":
            executing.cancel()
        case "fenced":
            p.runner.latch("r1", LatchReason.FENCED)
        case "max_duration":
            pass
    await asyncio.wait([executing])


AFTER = {
    "hand-over": RunState.QUEUED,
    "cancelled": RunState.CANCELLED,
    "max_duration": RunState.FAILED,
    "soft time limit": RunState.FAILED,
    "hard time limit": RunState.QUEUED,
    "fenced": RunState.RUNNING,
}


@pytest.mark.parametrize("how", STOPS)
async def test_tasks_that_a_pattern_has_started_stop_with_its_run(redis_url: str, how: str) -> None:
    """They are cancelled. The run and its session continue only when they have ended."""
    budget = {"max_duration_ms": 100} if how == "max_duration" else None
    async with worker(redis_url, patterned("StartsTasks")) as p:
        await p.submit(budget=budget)
        executing = await executed_until(p, lambda: len(plugins.LOG) >= 4, "both tasks work")

        await stopped(p, how, executing)

        assert sorted(entry[1] for entry in plugins.LOG if entry[0] == "stopped") == ["one", "two"]
        count = len(plugins.LOG)
        await asyncio.sleep(0.02)
        assert len(plugins.LOG) == count
        assert (await p.record()).state is AFTER[how]
        assert p.left == []
        await p.store.redis.hset(p.store.keys("run", "r1"), "cancel", "1")
        await p.execute()


async def test_shared_connections_do_not_belong_to_a_run(redis_url: str) -> None:
    """A connection opened for the command of one run also serves other runs."""
    async with worker(redis_url) as p:
        code = RunCode("r1", "a", Latch())
        context = copy_context()
        context.run(current_run.set, code)
        record = p.store.run(scripts.page(run_id="r1", position=0, page_bytes=1))
        asking = asyncio.create_task(record, name="asking", context=context)

        def working() -> set[str]:
            return {task.get_name() for task in asyncio.all_tasks()}

        while "redis pipeline" not in working():
            assert not asking.done()
            await asyncio.sleep(0)

        assert {task.get_name() for task in code.tasks()} == {"asking"}
        await asking


@pytest.mark.parametrize("blocking", [BLOCKING, BLOCK_A_THREAD], ids=["asyncio.to_thread", "a sync tool"])
@pytest.mark.parametrize("how", [how for how in STOPS if how != "max_duration"])
async def test_a_run_waits_for_its_thread(redis_url: str, how: str, blocking: dict[str, Any]) -> None:
    """A thread cannot be stopped: the run keeps its session until the thread has ended."""
    async with worker(redis_url, calling(blocking), agent("b")) as p:
        await p.submit()
        await p.submit("r2", agent_id="b")
        executing = await executed_until(p, lambda: plugins.LOG == [("blocked",)], "the thread is blocked")
        stopping = asyncio.create_task(stopped(p, how, executing))
        await await_for(lambda: p.runner._attempts["r1"].latch.reason is not None, "the run is told to stop")
        await asyncio.sleep(0.02)
        assert not executing.done()
        assert (await p.record()).state is RunState.RUNNING
        assert (await p.execute("r2")).reason == "waiting"

        plugins.Blocking.free.set()
        await stopping

        assert plugins.LOG[-1] == ("freed",)
        assert (await p.record()).state is AFTER[how]
        assert p.left == []


@pytest.mark.parametrize("blocking", [BLOCKING, BLOCK_A_THREAD], ids=["asyncio.to_thread", "a sync tool"])
async def test_a_process_whose_thread_does_not_stop_exits(
    redis_url: str, blocking: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Before its lease ends, with a log line that names run, agent and tool.

    Nothing is written. Other workers recover the run.
    """
    async with worker(redis_url, calling(blocking), OPENAGENTS_STOP_GRACE_S="0.1") as p:
        await p.submit()
        executing = await executed_until(p, lambda: plugins.LOG == [("blocked",)], "the thread is blocked")

        p.runner.latch("r1", LatchReason.CANCELLED)

        assert (await executing).reason == "fenced"
        assert p.left == [70]
        (line,) = [record.getMessage() for record in caplog.records if "does_not_stop" in record.getMessage()]
        for named in ("run_id=r1", "agent_id=a", "tool blocking"):
            assert named in line
        assert (await p.record()).state is RunState.RUNNING


async def test_a_timed_out_call_may_continue_in_its_thread(redis_url: str) -> None:
    """The run is retried at once and keeps its session: a thread that hangs does not end the process."""
    blocking = {**BLOCK_A_THREAD, "timeout_ms": 50}
    async with worker(redis_url, calling(blocking), OPENAGENTS_STOP_GRACE_S="0.1") as p:
        await p.submit()

        attempt_result = await p.execute()

        assert (attempt_result.kind, attempt_result.reason) == (AttemptOutcome.SUSPENDED, "tool.timeout")
        assert p.left == []
        await p.store.run(scripts.cancel(run_id="r1", reason="", force=False))


async def test_a_pattern_that_does_not_stop_ends_its_process(redis_url: str) -> None:
    """It swallows every cancellation. Its session must not continue beside it."""
    async with worker(redis_url, patterned("NeverLetsGo"), OPENAGENTS_STOP_GRACE_S="0.1") as p:
        await p.submit()
        executing = await executed_until(p, lambda: plugins.LOG == [("waiting",)], "it works")

        p.runner.latch("r1", LatchReason.CANCELLED)

        assert (await executing).reason == "fenced"
        assert p.left == [70]
        plugins.GATES["let go"].set()


async def test_a_soft_time_limit_fails_the_run(redis_url: str) -> None:
    """The error names the limit. The pattern has stopped."""
    async with worker(redis_url, patterned("Endless")) as p:
        await p.submit()
        executing = await executed_until(p, lambda: plugins.LOG == [("waiting",)], "it works")

        p.runner.interrupt("r1", SoftTimeLimitExceeded(1))

        assert (await executing).stop_reason is StopReason.FAILED
        code, message = error_of(await p.record())
        assert code == "pattern.error"
        assert "SoftTimeLimitExceeded" in message


async def test_a_run_can_be_resumed_after_a_time_limit(redis_url: str) -> None:
    """The call in progress is not recorded as cancelled: the next life makes it again."""
    async with worker(redis_url, patterned("Steps", tool("Charge"), n=1)) as p:
        await p.submit(budget={"max_duration_ms": 50})
        await p.execute()

        assert error_of(await p.record())[0] == "execution.budget_exhausted"
        assert [record["call"] for record in await p.journal()] == ["prepare"]


async def test_no_call_begins_once_its_run_has_ended(redis_url: str) -> None:
    """Code that survives its run cannot make recorded calls."""
    async with worker(redis_url, patterned("LeavesItsTools", tool("Charge"))) as p:
        assert (await p.run()).state is RunState.COMPLETED
        charge = plugins.LOG.pop()[1]
        with pytest.raises(BaseException, match="fenced"):
            await charge.invoke({"who": "late"})
        assert plugins.executed("charge") == []


def calling(blocking: dict[str, Any]) -> dict[str, Any]:
    return agent(tools=[blocking], pattern={"impl": "tests.runtime.plugins.CallsBlocking"})
