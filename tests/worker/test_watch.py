"""The watch: it sees a blocked loop, a dead one, and runs that do not let go."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from openagents_worker.runtime.latch import LatchReason
from openagents_worker.worker.bridge import LoopThread
from openagents_worker.worker.lease import WorkerLease, boot_clock
from openagents_worker.worker.watch import EX_LOOP_DEAD, Watch
from tests.waiting import wait_for
from tests.worker.carrier import NotingCarrier


class Watched:
    """A watch over a lease; what it would have done to this process stands in `left`."""

    def __init__(self, bridge: LoopThread, carrier: NotingCarrier, **how: Any) -> None:
        self.lease = WorkerLease("w:1", lease_s=60, sent_s=boot_clock())
        self.left: list[int] = []
        self.watch = Watch(
            loop=bridge.loop,
            loop_thread_id=lambda: bridge.thread_id,
            lease=lambda: self.lease,
            carrier=carrier,
            leave=self.left.append,
            **how,
        )
        self.watch.start()


@pytest.fixture
def watched(bridge: LoopThread, carrier: NotingCarrier) -> Generator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(**how: Any) -> Watched:
        made.append(Watched(bridge, carrier, **how))
        return made[-1]

    yield make
    for one in made:
        one.watch.stop()


def block_here(free: threading.Event) -> None:
    """The name that the watch has to find."""
    free.wait(10)


def test_runs_let_go_when_the_lease_is_over(watched: Callable[..., Watched], carrier: NotingCarrier) -> None:
    """And the lease knows it: only then may the process register anew."""
    one = watched()

    one.lease.give_up()

    wait_for(one.lease.let_go.is_set, "the runs have let go")
    assert carrier.all_latched == [LatchReason.FENCED]
    assert one.left == []


def test_a_process_whose_runs_do_not_let_go_ends(
    watched: Callable[..., Watched], carrier: NotingCarrier
) -> None:
    """Better no process than one that acts beside its successor."""
    carrier.letting_go.clear()
    one = watched()
    one.lease = WorkerLease("w:2", lease_s=1, sent_s=boot_clock())

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

    bridge.loop.call_soon_threadsafe(free.wait, 10)
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
    looks = 0
    working = threading.Event()

    def waited_s() -> float:
        nonlocal looks
        looks += 1
        return 0.0

    free = threading.Event()
    one = watched(is_busy=working.is_set, began=bridge.began, loop_waited_s=waited_s)
    time.sleep(1.2)
    assert looks <= 4

    working.set()
    before, began = looks, time.monotonic()
    bridge.began.set()
    bridge.loop.call_soon_threadsafe(block_here, free)

    wait_for(lambda: one.watch.stats()["blocks"] == 1, "the block is seen")
    wait_for(lambda: looks >= before + 10, "it is looked at often")
    assert time.monotonic() - began < 4, "ten looks at two a second would take five"
    free.set()
    working.clear()
