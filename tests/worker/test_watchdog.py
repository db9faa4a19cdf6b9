"""The loop watchdog: it detects a blocked loop, a dead loop, and runs that do not stop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest

from openagents_worker.errors import RedisUnreachable
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.lease import WorkerLease, boot_clock
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.watchdog import (
    EX_LOOP_DEAD,
    IDLE_TICK_S,
    TICK_S,
    LoopWatchdog,
    WatchdogCallbacks,
    WatchdogClocks,
    WatchdogLimits,
    WatchedLoop,
)
from tests.support.waiting import PATIENCE_S, await_for, wait_for
from tests.worker.run_host import RecordingRunHost


def limits(lease_s: int) -> TimeLimits:
    return TimeLimits.of(lease_ms=lease_s * 1000, heartbeat_ms=lease_s * 250)


class WatchdogUnderTest:
    """A watchdog with a lease; `left` holds the exit codes with which it would have ended the process."""

    def __init__(self, loop_thread: LoopThread, run_host: RecordingRunHost, **options: Any) -> None:
        self.lease = WorkerLease("w:1", limits=limits(60), sent_s=boot_clock())
        self.left: list[int] = []
        self.watchdog = LoopWatchdog(
            WatchedLoop(
                loop=loop_thread.loop,
                thread_id=lambda: loop_thread.thread_id,
                **_taken(options, "is_busy", "work_began"),
            ),
            lease=lambda: self.lease,
            run_host=run_host,
            limits=WatchdogLimits(**_taken(options, "dead_after_s")),
            callbacks=WatchdogCallbacks(**_taken(options, "busy_tool_threads", "accuse")),
            clocks=WatchdogClocks(**_taken(options, "pause")),
            leave=self.left.append,
        )
        assert not options, f"no part of a watchdog has the options {options}"
        self.watchdog.start()


def _taken(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """The options of these names, removed from `options`."""
    return {name: options.pop(name) for name in names if name in options}


@pytest.fixture
def make_watchdog(
    loop_thread: LoopThread, run_host: RecordingRunHost
) -> Generator[Callable[..., WatchdogUnderTest]]:
    made: list[WatchdogUnderTest] = []

    def make(**options: Any) -> WatchdogUnderTest:
        made.append(WatchdogUnderTest(loop_thread, run_host, **options))
        return made[-1]

    yield make
    for one in made:
        one.watchdog.stop()


def block_here(free: threading.Event) -> None:
    """The function whose name the log line must contain."""
    free.wait(PATIENCE_S)


def test_runs_are_stopped_when_the_lease_is_over(
    make_watchdog: Callable[..., WatchdogUnderTest], run_host: RecordingRunHost
) -> None:
    """And the lease notes it: only then may the process register a new incarnation."""
    one = make_watchdog()

    one.lease.give_up()

    wait_for(one.lease.runs_stopped.is_set, "all runs have stopped")
    assert run_host.all_latched == [LatchReason.FENCED]
    assert one.left == []


def test_a_process_whose_runs_do_not_stop_ends(
    make_watchdog: Callable[..., WatchdogUnderTest], run_host: RecordingRunHost
) -> None:
    """Another worker may execute the runs, so the process must not continue."""
    run_host.stop_allowed.clear()
    one = make_watchdog()
    one.lease = WorkerLease("w:2", limits=limits(1), sent_s=boot_clock())

    one.lease.give_up()

    wait_for(lambda: one.left, "the process would have ended")
    assert one.left[0] == EX_LOOP_DEAD
    assert not one.lease.runs_stopped.is_set()


@pytest.mark.allow_blocking(reason="a blocked loop is what the test is about")
def test_what_blocks_the_loop_is_named_once(
    make_watchdog: Callable[..., WatchdogUnderTest], loop_thread: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning shows where the loop's thread is, not only that it is busy."""
    caplog.set_level(logging.WARNING, "openagents_worker")
    make_watchdog()
    free = threading.Event()

    loop_thread.loop.call_soon_threadsafe(block_here, free)
    wait_for(lambda: "loop.blocked" in caplog.text, "the watchdog has warned")
    free.set()

    assert "block_here" in caplog.text
    assert caplog.text.count("loop.blocked") == 1


@pytest.mark.allow_blocking(reason="a dead loop is what the test is about")
def test_a_process_whose_loop_is_dead_ends(
    make_watchdog: Callable[..., WatchdogUnderTest], loop_thread: LoopThread
) -> None:
    """Otherwise its lease would be renewed for ever although no run makes progress."""
    one = make_watchdog(dead_after_s=0.5)
    free = threading.Event()

    loop_thread.loop.call_soon_threadsafe(free.wait, PATIENCE_S)
    wait_for(lambda: one.left, "the process would have ended")
    free.set()

    assert one.left[0] == EX_LOOP_DEAD


def test_a_process_whose_loop_is_closed_ends(
    make_watchdog: Callable[..., WatchdogUnderTest], loop_thread: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    """No task can run on it, while the lease would be renewed for ever."""
    one = make_watchdog()

    loop_thread.stop()
    wait_for(lambda: one.left, "the process would have ended")

    assert one.left[0] == EX_LOOP_DEAD
    assert "loop.dead" in caplog.text


def test_a_process_whose_loop_has_stopped_ends(
    make_watchdog: Callable[..., WatchdogUnderTest], caplog: pytest.LogCaptureFixture
) -> None:
    """As after an unexpected exception in the loop's thread."""
    stopped = LoopThread()  # never started
    one = WatchdogUnderTest(stopped, RecordingRunHost())
    wait_for(lambda: one.left, "the process would have ended")
    one.watchdog.stop()
    stopped.loop.close()

    assert one.left[0] == EX_LOOP_DEAD


def test_an_idle_loop_is_checked_rarely_until_work_starts(
    make_watchdog: Callable[..., WatchdogUnderTest], loop_thread: LoopThread
) -> None:
    """Twenty checks a second would be most of an idle worker's cost; new work is monitored at once."""
    working = threading.Event()
    pauses: list[tuple[bool, float]] = []

    def pause(event: threading.Event, seconds: float) -> bool:
        pauses.append((event is loop_thread.work_began, seconds))
        if len(pauses) == 3:
            working.set()
            loop_thread.work_began.set()
        if len(pauses) <= 6:
            return event.is_set()
        return event.wait()  # until the watchdog is stopped

    make_watchdog(is_busy=working.is_set, work_began=loop_thread.work_began, pause=pause)

    wait_for(lambda: len(pauses) == 7, "seven checks were made")
    assert pauses == [(True, IDLE_TICK_S)] * 3 + [(False, TICK_S)] * 4


def test_the_start_of_work_ends_the_long_pause(loop_thread: LoopThread) -> None:
    """The event that an idle watchdog waits for is set when work starts."""

    async def began() -> None:
        await await_for(loop_thread.work_began.is_set, "the watchdog is told")

    loop_thread.run(began())


def test_a_tool_in_a_thread_may_end_before_the_runs_count_as_stopped(
    make_watchdog: Callable[..., WatchdogUnderTest],
) -> None:
    """A thread cannot be cancelled; if it ends in time, the process is not ended."""
    is_tool_running = threading.Event()
    is_tool_running.set()
    checks: list[bool] = []

    def busy_tool_threads() -> int:
        checks.append(is_tool_running.is_set())
        return int(is_tool_running.is_set())

    one = make_watchdog(busy_tool_threads=busy_tool_threads)

    one.lease.give_up()
    wait_for(lambda: checks, "the watchdog waits for the thread")
    still = one.lease.runs_stopped.is_set()
    is_tool_running.clear()

    wait_for(one.lease.runs_stopped.is_set, "all runs have stopped")
    assert not still
    assert one.left == []


def test_a_process_whose_tool_still_runs_in_a_thread_ends(
    make_watchdog: Callable[..., WatchdogUnderTest], caplog: pytest.LogCaptureFixture
) -> None:
    """The log line names the reason, the exit code and the number of threads."""
    caplog.set_level(logging.ERROR, "openagents_worker")
    one = make_watchdog(busy_tool_threads=lambda: 1)
    one.lease = WorkerLease("w:2", limits=limits(1), sent_s=boot_clock())

    one.lease.give_up()

    wait_for(lambda: one.left, "the process would have ended")
    assert one.left[0] == EX_LOOP_DEAD
    assert "a tool still runs in a thread" in caplog.text
    assert not one.lease.runs_stopped.is_set()


@pytest.mark.allow_blocking(reason="a dead loop is what the test is about")
@pytest.mark.parametrize("is_redis_reachable", [True, False])
def test_the_run_that_blocks_the_loop_for_good_is_named(
    make_watchdog: Callable[..., WatchdogUnderTest], loop_thread: LoopThread, is_redis_reachable: bool
) -> None:
    """Also if code outside any recorded call blocks it; without Redis the process still ends."""
    accused: list[str] = []
    free = threading.Event()

    def accuse(run_id: str) -> None:
        accused.append(run_id)
        if not is_redis_reachable:
            raise RedisUnreachable("cannot reach Redis")

    async def pattern() -> None:
        free.wait(60)

    async def start() -> None:
        started.append(asyncio.create_task(pattern(), name="run r1"))

    started: list[asyncio.Task[None]] = []
    one = make_watchdog(dead_after_s=0.5, accuse=accuse)

    asyncio.run_coroutine_threadsafe(start(), loop_thread.loop)
    wait_for(lambda: one.left, "the process would have ended")
    free.set()

    assert one.left[0] == EX_LOOP_DEAD
    assert accused[0] == "r1"
