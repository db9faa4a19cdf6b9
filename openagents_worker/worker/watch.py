"""The watch. The only place that looks at this process from beside: does its loop live, may it still act?

A thread that never waits for Redis nor long for the loop: it is there for when they do not answer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from openagents_worker.runtime.latch import LatchReason
from openagents_worker.telemetry import get_logger
from openagents_worker.worker.heartbeat import Carrier
from openagents_worker.worker.lease import WorkerLease

__all__ = ["EX_LOOP_DEAD", "Watch"]

log = get_logger(__name__)

EX_LOOP_DEAD = 70  # EX_SOFTWARE of sysexits.h
TICK_S = 0.1
LAG_S = 0.25  # a loop that is busy for so long delays every run of the process
SAY_AGAIN_S = 10.0
DEAD_AFTER_S = 120.0


class Watch:
    """Stops all runs when the lease is over; names what blocks the loop; ends a process beyond help."""

    def __init__(
        self,
        *,
        loop: asyncio.AbstractEventLoop,
        loop_thread_id: Callable[[], int | None],
        lease: Callable[[], WorkerLease],
        carrier: Carrier,
        leave: Callable[[int], object] = os._exit,
        dead_after_s: float = DEAD_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._loop_thread_id = loop_thread_id
        self._lease = lease
        self._carrier = carrier
        self._leave = leave
        self._dead_after_s = dead_after_s
        self._clock = clock
        self._silent_s = 0.0
        self._said_s = -SAY_AGAIN_S
        self._answered = threading.Event()
        self._answered.set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="openagents-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _main(self) -> None:
        last_s = self._clock()
        while not self._stopping.wait(TICK_S):
            now_s = self._clock()
            # After a SIGSTOP of the whole process the step is large, and the loop is not to blame.
            self._look_at_loop(min(now_s - last_s, 2 * TICK_S))
            last_s = now_s
            self._look_at_lease(self._lease())

    def _look_at_lease(self, lease: WorkerLease) -> None:
        """The lease is over: every run lets go before others may take it, or the process ends."""
        if lease.let_go.is_set() or lease.remaining_s() > 0 or self._loop.is_closed():
            return
        within_s = lease.confirm_within_s()
        runs = len(self._carrier.known())
        latched = asyncio.run_coroutine_threadsafe(self._carrier.latch_all(LatchReason.FENCED), self._loop)
        try:
            latched.result(within_s)
        except concurrent.futures.TimeoutError:
            log.error("worker.did_not_let_go", incarnation=lease.incarnation, within_s=within_s, runs=runs)
            self._leave(EX_LOOP_DEAD)
            return
        except concurrent.futures.CancelledError:
            return  # the loop is ending, and every run with it
        except Exception:  # whatever it was: nobody can say that the runs have let go
            log.exception("worker.did_not_let_go", incarnation=lease.incarnation)
            self._leave(EX_LOOP_DEAD)
            return
        log.warning("worker.let_go", incarnation=lease.incarnation, runs=runs)
        lease.let_go.set()

    def _look_at_loop(self, passed_s: float) -> None:
        if self._loop.is_closed():
            return
        if self._answered.is_set():
            self._answered.clear()
            self._silent_s = 0.0
            self._loop.call_soon_threadsafe(self._answered.set)
            return
        self._silent_s += passed_s
        if self._silent_s >= self._dead_after_s:
            log.error("loop.dead", silent_s=round(self._silent_s, 1), stack=self._stack())
            self._leave(EX_LOOP_DEAD)
        elif self._silent_s >= LAG_S and self._clock() - self._said_s >= SAY_AGAIN_S:
            self._said_s = self._clock()
            log.warning("loop.blocked", silent_s=round(self._silent_s, 2), stack=self._stack())

    def _stack(self) -> str:
        """Where the loop's thread is right now: the innermost frames say what blocks it."""
        frame = sys._current_frames().get(self._loop_thread_id() or 0)
        return "".join(traceback.format_stack(frame, limit=12)) if frame is not None else ""
