"""Stop really stops: once a run has been put aside or has ended, none of its code runs in the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from openagents_worker.models import RunState, StopReason
from openagents_worker.runtime.latch import Latch, LatchReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.runtime.user_code import RunCode, current_run
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.tools.offload import TrackedThreads
from openagents_worker.worker.loop_thread import _Task
from tests.runtime import plugins
from tests.runtime.harness import Process, agent, process
from tests.runtime.test_endings import told
from tests.runtime.test_replay import carried_until, patterned, tool
from tests.waiting import await_for, wait_for

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
async def worker(redis_url: str, *agents: dict[str, Any], **env: str) -> AsyncIterator[Process]:
    """A process on a loop as a worker's is: it knows what its tasks belong to, and its threads, too."""
    loop = asyncio.get_running_loop()
    loop.set_task_factory(_Task.make)  # type: ignore[arg-type]
    threads = TrackedThreads()
    loop.set_default_executor(threads)
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, **env})
    async with process(redis_url, *agents, settings=settings) as p:
        yield p
        plugins.Blocking.free.set()  # whoever closes the loop waits for its threads


async def stopped(p: Process, how: str, executing: asyncio.Task[Any]) -> None:
    """Stop the run in this way, and wait until it is let go of."""
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
    """They are cancelled, and waited for while they tidy up, before the run goes on or its session does."""
    budget = {"max_duration_ms": 100} if how == "max_duration" else None
    async with worker(redis_url, patterned("StartsTasks")) as p:
        await p.submit(budget=budget)
        executing = await carried_until(p, lambda: len(plugins.LOG) >= 4, "both tasks work")

        await stopped(p, how, executing)

        assert sorted(entry[1] for entry in plugins.LOG if entry[0] == "stopped") == ["one", "two"]
        count = len(plugins.LOG)
        await asyncio.sleep(0.02)
        assert len(plugins.LOG) == count
        assert (await p.record()).state is AFTER[how]
        assert p.left == []
        await p.store.redis.hset(p.store.keys("run", "r1"), "cancel", "1")
        await p.execute()


async def test_what_the_runs_of_a_process_share_belongs_to_none_of_them(redis_url: str) -> None:
    """The connection on which a run's command is the first one carries those of others, too."""
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
        executing = await carried_until(p, lambda: plugins.LOG == [("blocked",)], "the thread is blocked")
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
async def test_a_process_whose_thread_does_not_stop_ends(
    redis_url: str, blocking: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Before its lease does, and with one line that names the run, its agent and its tool. Nothing is
    written: others take the run when the process is gone."""
    async with worker(redis_url, calling(blocking), OPENAGENTS_STOP_GRACE_S="0.1") as p:
        await p.submit()
        executing = await carried_until(p, lambda: plugins.LOG == [("blocked",)], "the thread is blocked")

        p.runner.latch("r1", LatchReason.CANCELLED)

        assert (await executing).reason == "fenced"
        assert p.left == [70]
        (line,) = [record.getMessage() for record in caplog.records if "does_not_stop" in record.getMessage()]
        for named in ("run_id=r1", "agent_id=a", "tool blocking"):
            assert named in line
        assert (await p.record()).state is RunState.RUNNING


async def test_a_call_whose_time_is_over_may_go_on_in_its_thread(redis_url: str) -> None:
    """Its run is tried again at once, and keeps its session: a thread that hangs costs no process."""
    blocking = {**BLOCK_A_THREAD, "timeout_ms": 50}
    async with worker(redis_url, calling(blocking), OPENAGENTS_STOP_GRACE_S="0.1") as p:
        await p.submit()

        attempt_result = await p.execute()

        assert (attempt_result.kind, attempt_result.reason) == (AttemptOutcome.SUSPENDED, "tool.timeout")
        assert p.left == []
        await p.store.run(scripts.cancel(run_id="r1", reason="", force=False))


async def test_a_pattern_that_does_not_let_go_ends_its_process(redis_url: str) -> None:
    """It swallows every cancellation: its session must not go on beside it."""
    async with worker(redis_url, patterned("NeverLetsGo"), OPENAGENTS_STOP_GRACE_S="0.1") as p:
        await p.submit()
        executing = await carried_until(p, lambda: plugins.LOG == [("waiting",)], "it works")

        p.runner.latch("r1", LatchReason.CANCELLED)

        assert (await executing).reason == "fenced"
        assert p.left == [70]
        plugins.GATES["let go"].set()


async def test_a_soft_time_limit_ends_the_run_as_failed(redis_url: str) -> None:
    """Its error says so; its pattern has stopped."""
    async with worker(redis_url, patterned("Endless")) as p:
        await p.submit()
        executing = await carried_until(p, lambda: plugins.LOG == [("waiting",)], "it works")

        p.runner.interrupt("r1", SoftTimeLimitExceeded(1))

        assert (await executing).stop_reason is StopReason.FAILED
        code, message = told(await p.record())
        assert code == "pattern.error"
        assert "SoftTimeLimitExceeded" in message


async def test_a_time_limit_leaves_a_run_that_can_be_resumed(redis_url: str) -> None:
    """The call it was in is not recorded as cancelled: the next life makes it again."""
    async with worker(redis_url, patterned("Steps", tool("Charge"), n=1)) as p:
        await p.submit(budget={"max_duration_ms": 50})
        await p.execute()

        assert told(await p.record())[0] == "execution.budget_exhausted"
        assert [record["call"] for record in await p.journal()] == ["prepare"]


async def test_no_call_starts_once_its_run_has_ended(redis_url: str) -> None:
    """Code that outlives its run finds the door closed."""
    async with worker(redis_url, patterned("LeavesItsTools", tool("Charge"))) as p:
        assert (await p.run()).state is RunState.COMPLETED
        charge = plugins.LOG.pop()[1]
        with pytest.raises(BaseException, match="fenced"):
            await charge.invoke({"who": "late"})
        assert plugins.executed("charge") == []


def calling(blocking: dict[str, Any]) -> dict[str, Any]:
    return agent(tools=[blocking], pattern={"impl": "tests.runtime.plugins.CallsBlocking"})
