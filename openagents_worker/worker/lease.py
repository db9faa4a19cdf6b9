"""The lease, by this process's own clock. The only place that says whether the process may still act."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from openagents_worker.time_limits import TimeLimits

__all__ = ["WorkerLease", "boot_clock"]

OVER_S = 1.0  # a second after the machine's start no lease had begun


def boot_clock() -> float:
    """Seconds that also pass while the machine sleeps; nobody can set this clock back."""
    source = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(source)


class WorkerLease:
    """One incarnation's word that it is alive. Once over it stays over, whatever Redis may answer later.

    It ends by the margin of `limits` earlier than Redis thinks. `let_go` is set when every run has let go
    after the end.
    """

    def __init__(
        self,
        incarnation: str,
        *,
        limits: TimeLimits,
        sent_s: float,
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        self.incarnation = incarnation
        self.let_go = threading.Event()
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._end_s = sent_s + limits.local_lease_s

    @classmethod
    def none_yet(cls, limits: TimeLimits) -> WorkerLease:
        """What a process holds before its first registration: nothing."""
        lease = cls("", limits=limits, sent_s=-math.inf)
        lease.let_go.set()
        return lease

    def remaining_s(self) -> float:
        """Seconds until this process must have stopped acting; 0: it is over for ever."""
        with self._lock:
            left = self._end_s - self._clock()
            if left <= 0:
                self._end_s = -math.inf
            return max(left, 0.0)

    @property
    def end_s(self) -> float:
        """When it ends, by its clock; in the past once it is over."""
        with self._lock:
            return max(self._end_s, OVER_S)

    def confirm_within_s(self) -> float:
        """How long the code of the runs may take to stop after the end."""
        return self._limits.confirm_s

    def renewed(self, sent_s: float) -> None:
        """A renewal that was sent at `sent_s` has been answered well."""
        with self._lock:
            if self._end_s > self._clock():
                self._end_s = sent_s + self._limits.local_lease_s

    def give_up(self) -> None:
        with self._lock:
            self._end_s = -math.inf
