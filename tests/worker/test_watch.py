"""The watch: it sees a blocked loop, a dead one, and runs that do not let go."""

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
from openagents_worker.worker.watchdog import EX_LOOP_DEAD, IDLE_TICK_S, TICK_S, LoopWatchdog
from tests.waiting import PATIENCE_S, wait_for
from tests.worker.run_host import NotingCarrier


def limits(lease_s: int) -> TimeLimits:
    return TimeLimits.of(lease_ms=lease_s * 1000, heartbeat_ms=lease_s * 250)


class Watched:
    """A watch over a lease; what it would have done to this process stands in `left`."""

    def __init__(self, bridge: LoopThread, run_host: NotingCarrier, **how: Any) -> None:
        self.lease = WorkerLease("w:1", limits=limits(60), sent_s=boot_clock())
        self.left: list[int] = []
        self.watch = LoopWatchdog(
            loop=bridge.loop,
            loop_thread_id=lambda: bridge.thread_id,
            lease=lambda: self.lease,
            run_host=run_host,
            leave=self.left.append,
            **how,
        )
        self.watch.start()


@pytest.fixture
def watched(bridge: LoopThread, run_host: NotingCarrier) -> Generator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(**how: Any) -> Watched:
        made.append(Watched(bridge, run_host, **how))
        return made[-1]

    yield make
    for one in made:
        one.watch.stop()


def block_here(free: threading.Event) -> None:
    """The name that the watch has to find."""
    free.wait(PATIENCE_S)


def test_runs_let_go_when_the_lease_is_over(watched: Callable[..., Watched], run_host: NotingCarrier) -> None:
    """And the lease knows it: only then may the process register anew."""
    one = watched()

    one.lease.give_up()

    wait_for(one.lease.let_go.is_set, "the runs have let go")
    assert run_host.all_latched == [LatchReason.FENCED]
    assert one.left == []


def test_a_process_whose_runs_do_not_let_go_ends(
    watched: Callable[..., Watched], run_host: NotingCarrier
) -> None:
    """Better no process than one that acts beside its successor."""
    run_host.letting_go.clear()
    one = watched()
    one.lease = WorkerLease("w:2", limits=limits(1), sent_s=boot_clock())

    one.lease.give_up()

    wait_for(lambda: one.left, "the process would have ended")
    assert one.left[0] == EX_LOOP_DEAD
    assert not one.lease.let_go.is_set()


@pytest.mark.allow_blocking(reason="a blocked loop is what the test is about")
def test_what_blocks_the_loop_is_named_once(
    watched: Callable[..., Watched], bridge: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning shows where the loop's thread is, not only that it is busy."""
    caplog.set_level(logging.WARNING, "openagents_worker")
    watched()
    free = threading.Event()

    bridge.loop.call_soon_threadsafe(block_here, free)
    wait_for(lambda: "loop.blocked" in caplog.text, "the watch has warned")
    free.set()

    assert "block_here" in caplog.text
    assert caplog.text.count("loop.blocked") == 1


@pytest.mark.allow_blocking(reason="a dead loop is what the test is about")
def test_a_process_whose_loop_is_dead_ends(watched: Callable[..., Watched], bridge: LoopThread) -> None:
    """Its lease would be renewed for ever, with nobody behind it."""
    one = watched(dead_after_s=0.5)
    free = threading.Event()

    bridge.loop.call_soon_threadsafe(free.wait, PATIENCE_S)
    wait_for(lambda: one.left, "the process would have ended")
    free.set()

    assert one.left[0] == EX_LOOP_DEAD


def test_a_process_whose_loop_is_closed_ends(
    watched: Callable[..., Watched], bridge: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody can run anything on it any more, while the lease would be renewed for ever."""
    one = watched()

    bridge.stop()
    wait_for(lambda: one.left, "the process would have ended")

    assert one.left[0] == EX_LOOP_DEAD
    assert "loop.dead" in caplog.text


def test_a_process_whose_loop_has_stopped_ends(
    watched: Callable[..., Watched], caplog: pytest.LogCaptureFixture
) -> None:
    """As after an exception that nobody was prepared for."""
    stopped = LoopThread()  # never started
    one = Watched(stopped, NotingCarrier())
    wait_for(lambda: one.left, "the process would have ended")
    one.watch.stop()
    stopped.loop.close()

    assert one.left[0] == EX_LOOP_DEAD


def test_an_idle_loop_is_looked_at_seldom_until_somebody_works(
    watched: Callable[..., Watched], bridge: LoopThread
) -> None:
    """Twenty looks a second would be most of what an idle worker costs; the first work is watched at once."""
    working = threading.Event()
    pauses: list[tuple[bool, float]] = []

    def pause(event: threading.Event, seconds: float) -> bool:
        pauses.append((event is bridge.began, seconds))
        if len(pauses) == 3:
            working.set()
            bridge.began.set()
        if len(pauses) <= 6:
            return event.is_set()
        return event.wait()  # until the watch is stopped

    watched(is_busy=working.is_set, began=bridge.began, pause=pause)

    wait_for(lambda: len(pauses) == 7, "it has looked seven times")
    assert pauses == [(True, IDLE_TICK_S)] * 3 + [(False, TICK_S)] * 4


def test_whoever_begins_to_work_ends_the_long_pause(bridge: LoopThread) -> None:
    """The event that an idle watch waits for is set before the work begins."""

    async def began() -> bool:
        return bridge.began.is_set()

    assert bridge.run(began())


def test_a_tool_in_a_thread_may_end_before_the_runs_count_as_stopped(
    watched: Callable[..., Watched],
) -> None:
    """A thread cannot be cancelled; one that ends in time costs nobody the process."""
    at_work = threading.Event()
    at_work.set()
    looks: list[bool] = []

    def threads_at_work() -> int:
        looks.append(at_work.is_set())
        return int(at_work.is_set())

    one = watched(threads_at_work=threads_at_work)

    one.lease.give_up()
    wait_for(lambda: looks, "the watch waits for the thread")
    still = one.lease.let_go.is_set()
    at_work.clear()

    wait_for(one.lease.let_go.is_set, "the runs have let go")
    assert not still
    assert one.left == []


def test_a_process_ends_whose_tool_goes_on_in_its_thread(
    watched: Callable[..., Watched], caplog: pytest.LogCaptureFixture
) -> None:
    """The line says why, with which code, and what was still at work."""
    caplog.set_level(logging.ERROR, "openagents_worker")
    one = watched(threads_at_work=lambda: 1)
    one.lease = WorkerLease("w:2", limits=limits(1), sent_s=boot_clock())

    one.lease.give_up()

    wait_for(lambda: one.left, "the process would have ended")
    assert one.left[0] == EX_LOOP_DEAD
    assert "a tool in a thread goes on" in caplog.text
    assert not one.lease.let_go.is_set()


@pytest.mark.allow_blocking(reason="a dead loop is what the test is about")
@pytest.mark.parametrize("redis_is_there", [True, False])
def test_the_run_that_blocks_the_loop_for_good_is_named(
    watched: Callable[..., Watched], bridge: LoopThread, redis_is_there: bool
) -> None:
    """Also by its own code, outside of any call; without Redis the process ends all the same."""
    accused: list[str] = []
    free = threading.Event()

    def accuse(run_id: str) -> None:
        accused.append(run_id)
        if not redis_is_there:
            raise RedisUnreachable("cannot reach Redis")

    async def pattern() -> None:
        free.wait(60)

    async def start() -> None:
        started.append(asyncio.create_task(pattern(), name="run r1"))

    started: list[asyncio.Task[None]] = []
    one = watched(dead_after_s=0.5, accuse=accuse)

    asyncio.run_coroutine_threadsafe(start(), bridge.loop)
    wait_for(lambda: one.left, "the process would have ended")
    free.set()

    assert one.left[0] == EX_LOOP_DEAD
    assert accused[0] == "r1"
