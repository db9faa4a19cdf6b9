"""What the watch takes for a blocked loop: a call that sleeps, and one that keeps the whole interpreter."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator, Mapping
from typing import Any

import pytest

from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker.lease import WorkerLease, boot_clock
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.watchdog import BLOCKED_S, TICK_S, LoopWatchdog
from tests.waiting import PATIENCE_S, wait_for
from tests.worker.run_host import NotingCarrier

CALL = CallInfo("r1", "3", "r1:u:3", 0, kind="tool", name="greedy")

pytestmark = pytest.mark.allow_blocking(reason="a blocked loop is what these tests are about")


class NotedCarrier(NotingCarrier):
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
def run_host() -> NotedCarrier:
    return NotedCarrier()


@pytest.fixture
def watch(loop_thread: LoopThread, run_host: NotedCarrier) -> Generator[LoopWatchdog]:
    watch = made_watch(loop_thread, run_host, loop_waited_s=loop_thread.waited_s)
    watch.start()
    yield watch
    watch.stop()


def made_watch(loop_thread: LoopThread, run_host: NotedCarrier, **how: Any) -> LoopWatchdog:
    lease = WorkerLease(
        "w:1", limits=TimeLimits.of(lease_ms=60_000, heartbeat_ms=15_000), sent_s=boot_clock()
    )
    return LoopWatchdog(
        loop=loop_thread.loop,
        loop_thread_id=lambda: loop_thread.thread_id,
        lease=lambda: lease,
        run_host=run_host,
        **how,
    )


async def blocking(block: Any) -> None:
    current_call.set(CALL)
    await asyncio.gather(_child(block))


async def _child(block: Any) -> None:
    block()


def block_until_seen(watch: LoopWatchdog) -> None:
    while not watch.stats()["blocks"]:
        time.sleep(0.001)


def keep_the_interpreter() -> None:
    """One call in C that never lets another thread run, and that takes half a second of a core."""
    took_s, exponent = 0.0, 400_000
    while took_s < 0.5:
        exponent *= 2
        began_s = time.thread_time()
        3**exponent
        took_s = time.thread_time() - began_s


def test_a_block_is_told_to_its_run(
    watch: LoopWatchdog, loop_thread: LoopThread, run_host: NotedCarrier
) -> None:
    """Also when a task that the tool has started does it; with the tool's name and its whole length."""
    loop_thread.run(blocking(lambda: block_until_seen(watch)))

    (run_id, name, told) = wait_for(lambda: run_host.noted, "the run was told")[-1]
    assert (run_id, name) == ("r1", "worker.loop_blocked")
    assert (told["kind"], told["name"], told["call_id"]) == ("tool", "greedy", "3")
    assert told["blocked_ms"] >= (BLOCKED_S - TICK_S) * 1000
    assert watch.stats()["longest_block_ms"] >= told["blocked_ms"]


def test_a_call_that_keeps_the_interpreter_is_counted(watch: LoopWatchdog, loop_thread: LoopThread) -> None:
    """The watch, too, stands still meanwhile; it comes right after it, and may be too late for a name."""
    loop_thread.run(blocking(keep_the_interpreter))

    wait_for(lambda: watch.stats()["longest_block_ms"] >= 300, "the block was seen")


def test_a_loop_that_only_waits_is_not_blocked(loop_thread: LoopThread, run_host: NotedCarrier) -> None:
    """Waiting is what it is for, however long it takes: it answers whenever the watch looks."""
    now_s, looks = 0.0, 0
    waiting = asyncio.run_coroutine_threadsafe(asyncio.Event().wait(), loop_thread.loop)

    def pause(event: threading.Event, seconds: float) -> bool:
        """The loop turns, and so much time passes, 20 times; then the watch waits until it is stopped."""
        nonlocal now_s, looks
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop_thread.loop).result(PATIENCE_S)
        now_s, looks = now_s + seconds, looks + 1
        return event.wait() if looks > 20 else False

    watch = made_watch(loop_thread, run_host, clock=lambda: now_s, cpu_clock=lambda: now_s, pause=pause)
    watch.start()
    wait_for(lambda: looks > 20, "it has looked twenty times")
    watch.stop()
    waiting.cancel()

    assert now_s >= 20 * TICK_S
    assert run_host.noted == []
    assert watch.stats() == {"blocks": 0, "longest_block_ms": 0}
