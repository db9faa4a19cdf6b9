"""Blocks of the loop that the watchdog detects: a sleeping call, and a call that holds the GIL."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import pytest

from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.lease import WorkerLease, boot_clock
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.watchdog import BLOCKED_S, TICK_S, LoopWatchdog, WatchdogClocks, WatchedLoop
from tests.support.waiting import PATIENCE_S, wait_for
from tests.worker.run_host import RecordingRunHost

CALL = CallInfo("r1", "3", "r1:u:3", 0, kind="tool", name="greedy")

pytestmark = pytest.mark.allow_blocking(reason="these tests block the loop on purpose")


class EventRecordingRunHost(RecordingRunHost):
    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, str, Mapping[str, Any]]] = []

    def emit(self, run_id: str, name: str, payload: Mapping[str, Any]) -> None:
        self.noted.append((run_id, name, payload))


@pytest.fixture
def loop_thread() -> Generator[LoopThread]:
    thread = LoopThread()
    thread.start()
    yield thread
    thread.stop()


@pytest.fixture
def run_host() -> EventRecordingRunHost:
    return EventRecordingRunHost()


@pytest.fixture
def watchdog(loop_thread: LoopThread, run_host: EventRecordingRunHost) -> Generator[LoopWatchdog]:
    watchdog = new_watchdog(loop_thread, run_host, waited_s=loop_thread.waited_s)
    watchdog.start()
    wait_for(lambda: watchdog.health.report().rounds, "it has begun to look")
    yield watchdog
    watchdog.stop()


def new_watchdog(
    loop_thread: LoopThread,
    run_host: EventRecordingRunHost,
    *,
    waited_s: Callable[[], float] | None = None,
    clocks: WatchdogClocks | None = None,
) -> LoopWatchdog:
    lease = WorkerLease(
        "w:1", limits=TimeLimits.of(lease_ms=60_000, heartbeat_ms=15_000), sent_s=boot_clock()
    )
    return LoopWatchdog(
        WatchedLoop(
            loop=loop_thread.loop,
            thread_id=lambda: loop_thread.thread_id,
            waited_s=waited_s or (lambda: 0.0),
        ),
        lease=lambda: lease,
        run_host=run_host,
        clocks=clocks or WatchdogClocks(),
    )


async def blocking(block: Any) -> None:
    current_call.set(CALL)
    await asyncio.gather(_child(block))


async def _child(block: Any) -> None:
    block()


def block_until_seen(watchdog: LoopWatchdog) -> None:
    while not watchdog.stats()["blocks"]:
        time.sleep(0.001)


def hold_the_gil() -> None:
    """One call in C that does not release the GIL and uses half a second of processor time."""
    took_s, exponent = 0.0, 400_000
    while took_s < 0.5:
        exponent *= 2
        began_s = time.thread_time()
        3**exponent
        took_s = time.thread_time() - began_s


def test_a_block_is_an_event_of_its_run(
    watchdog: LoopWatchdog, loop_thread: LoopThread, run_host: EventRecordingRunHost
) -> None:
    """Also if a task that the tool has started blocks; with the tool's name and the whole duration."""
    loop_thread.run(blocking(lambda: block_until_seen(watchdog)))

    (run_id, name, payload) = wait_for(lambda: run_host.noted, "the event was emitted")[-1]
    assert (run_id, name) == ("r1", "worker.loop_blocked")
    assert (payload["kind"], payload["name"], payload["call_id"]) == ("tool", "greedy", "3")
    assert payload["blocked_ms"] >= (BLOCKED_S - TICK_S) * 1000
    assert watchdog.stats()["longest_block_ms"] >= payload["blocked_ms"]


def test_a_call_that_holds_the_gil_is_counted(watchdog: LoopWatchdog, loop_thread: LoopThread) -> None:
    """The watchdog cannot run meanwhile; it runs right after the call, possibly too late to name it."""
    loop_thread.run(blocking(hold_the_gil))

    wait_for(lambda: watchdog.stats()["longest_block_ms"] >= 300, "the block was seen")


def test_a_block_is_counted_whole_although_the_watchdog_waits_for_the_interpreter(
    loop_thread: LoopThread, run_host: EventRecordingRunHost
) -> None:
    """The watchdog has read the clock, then a call of the loop holds the GIL for another half second."""
    now_s, is_free, calls = 0.0, threading.Event(), iter([0.5])

    def is_seen_now() -> bool:
        return looking.silent_s() + TICK_S > BLOCKED_S - TICK_S - 0.001

    def pause(event: threading.Event, seconds: float) -> bool:
        nonlocal now_s
        now_s += seconds
        return event.wait() if is_free.is_set() else False

    def cpu_clock() -> float:
        nonlocal now_s
        taken_s = now_s
        if is_seen_now():
            now_s += next(calls, 0)
        if looking.stats()["blocks"]:
            is_free.set()
        return taken_s

    looking = new_watchdog(
        loop_thread,
        run_host,
        clocks=WatchdogClocks(clock=lambda: now_s, cpu_clock=cpu_clock, pause=pause),
    )
    blocked = asyncio.run_coroutine_threadsafe(blocking(is_free.wait), loop_thread.loop)
    looking.start()
    blocked.result(PATIENCE_S)
    wait_for(lambda: looking.stats()["longest_block_ms"] >= 500, "the whole block was counted")
    looking.stop()


def test_a_loop_that_only_waits_is_not_blocked(
    loop_thread: LoopThread, run_host: EventRecordingRunHost
) -> None:
    """However long it waits, it answers each check of the watchdog."""
    now_s, checks = 0.0, 0
    waiting = asyncio.run_coroutine_threadsafe(asyncio.Event().wait(), loop_thread.loop)

    def pause(event: threading.Event, seconds: float) -> bool:
        """Run the loop once and advance the clock, 20 times; then wait until the watchdog is stopped."""
        nonlocal now_s, checks
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop_thread.loop).result(PATIENCE_S)
        now_s, checks = now_s + seconds, checks + 1
        return event.wait() if checks > 20 else False

    watchdog = new_watchdog(
        loop_thread,
        run_host,
        clocks=WatchdogClocks(clock=lambda: now_s, cpu_clock=lambda: now_s, pause=pause),
    )
    watchdog.start()
    wait_for(lambda: checks > 20, "twenty checks were made")
    watchdog.stop()
    waiting.cancel()

    assert now_s >= 20 * TICK_S
    assert run_host.noted == []
    assert watchdog.stats() == {"blocks": 0, "longest_block_ms": 0}
