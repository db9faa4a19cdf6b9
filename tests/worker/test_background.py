"""Background parts: a process that has lost one of its parts ends, because it only looks healthy."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

import pytest

from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.background import (
    EX_PART_FAILED,
    ProcessControls,
    background_task,
    background_thread,
)
from openagents_worker.worker.completion_acks import CompletionAcks
from openagents_worker.worker.control_channel import ControlChannel
from openagents_worker.worker.heartbeat import Heartbeat, HeartbeatLimits, WorkerRegistration
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.watchdog import LoopWatchdog, WatchedLoop
from tests.support.waiting import await_for, wait_for
from tests.worker.run_host import RecordingRunHost


class Parts:
    """The exit codes with which the process would have ended, and the one log line with the reason."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.left: list[int] = []
        self._caplog = caplog

    def has_left_for(self, part: str, error: str) -> bool:
        lines = [r.getMessage() for r in self._caplog.records if "part_failed" in r.getMessage()]
        if not self.left:
            return False
        assert self.left == [EX_PART_FAILED]
        assert len(lines) == 1
        assert f"part={part}" in lines[0]
        assert error in lines[0]
        return True


@pytest.fixture
def parts(caplog: pytest.LogCaptureFixture) -> Parts:
    return Parts(caplog)


def broken(*_: Any, **__: Any) -> NoReturn:
    raise ZeroDivisionError("a bug")


def test_a_thread_that_fails_ends_the_process(parts: Parts) -> None:
    """With an exit code and a log line with the thread and the error."""
    background_thread(broken, name="mine", leave=parts.left.append).start()

    wait_for(lambda: parts.has_left_for("mine", "ZeroDivisionError: a bug"), "the process would end")


async def test_a_task_that_fails_ends_the_process(parts: Parts) -> None:
    """In the same way as a thread."""

    async def work() -> None:
        broken()

    background_task(work(), name="mine", leave=parts.left.append)

    await await_for(lambda: parts.has_left_for("mine", "ZeroDivisionError"), "the process would end")


async def test_a_task_that_is_stopped_has_not_failed(parts: Parts) -> None:
    """Neither has a task that is done."""

    async def work() -> None:
        await asyncio.Event().wait()

    async def done() -> None: ...

    task = background_task(work(), name="mine", leave=parts.left.append)
    await background_task(done(), name="mine", leave=parts.left.append)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(0)

    assert parts.left == []


def test_a_heartbeat_that_fails_ends_the_process(parts: Parts, cell: Cell, loop_thread: LoopThread) -> None:
    """Otherwise its lease would expire without an explanation."""
    heartbeat = Heartbeat(
        cell,
        WorkerRegistration(node="w"),
        limits=HeartbeatLimits(times=TimeLimits.of(lease_ms=1_000, heartbeat_ms=100)),
        run_host=RecordingRunHost(),
        loop=loop_thread.loop,
        process=ProcessControls(leave=parts.left.append, clock=broken),
    )
    heartbeat.start()

    wait_for(lambda: parts.has_left_for("openagents-heartbeat", "ZeroDivisionError"), "the process would end")
    heartbeat.stop()


def test_a_watchdog_that_fails_ends_the_process(parts: Parts, loop_thread: LoopThread) -> None:
    """Otherwise a dead loop would not be detected."""
    watchdog = LoopWatchdog(
        WatchedLoop(loop=loop_thread.loop, thread_id=lambda: loop_thread.thread_id),
        lease=broken,
        run_host=RecordingRunHost(),
        leave=parts.left.append,
    )
    watchdog.start()

    wait_for(lambda: parts.has_left_for("openagents-watchdog", "ZeroDivisionError"), "the process would end")
    watchdog.stop()


async def test_a_control_channel_that_fails_ends_the_process(parts: Parts, cell: Cell) -> None:
    """Otherwise every cancel request would wait for the next heartbeat."""
    control_channel, store = ControlChannel(cell, on_notice=broken, leave=parts.left.append), AsyncStore(cell)
    control_channel.follow("w:1")

    async def failed() -> bool:
        await store.ask(lambda r: r.publish(store.keys.notices("w:1"), "r1"))
        return parts.has_left_for("control-channel", "ZeroDivisionError")

    await await_for(failed, "the process would end")
    await store.close()
    await control_channel.aclose()


async def test_completion_acks_that_fail_end_the_process(parts: Parts, cell: Cell) -> None:
    """Otherwise Celery would be notified of ends repeatedly."""
    store = AsyncStore(cell)
    acks = CompletionAcks(store, leave=parts.left.append)
    acks.add("r1", None)  # type: ignore[arg-type]  # a value that redis-py cannot send
    acks._unwritten.append(object())  # type: ignore[arg-type]

    await await_for(lambda: parts.has_left_for("completion-acks", "Error"), "the process would end")
    await store.close()


async def test_a_caller_that_is_cancelled_does_not_stop_the_writer_of_acks(parts: Parts, cell: Cell) -> None:
    """Many runs share the writer; one of them may be cancelled while it waits for its ack."""
    store = AsyncStore(cell)
    acks = CompletionAcks(store, leave=parts.left.append)
    acks.add("r1", 1)
    waiting = asyncio.create_task(acks.aclose(), name="waiting")
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])

    await acks.aclose()

    assert acks.health.report().rounds == 1
    await store.close()
