"""The worker lease by the local clock: the only place that decides whether this process may still act."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from openagents_worker.time_limits import TimeLimits

__all__ = ["WorkerLease", "boot_clock"]

EXPIRED_S = 1.0  # one second after boot: every lease begins later


def boot_clock() -> float:
    """Seconds since boot, including suspended time. This clock is never set back."""
    source = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(source)


class WorkerLease:
    """The lease of one incarnation. Once expired it stays expired, whatever Redis answers later.

    It expires locally by the margin of `limits` earlier than in Redis. `runs_stopped` is set when every run
    has stopped after the expiry.
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
        self.runs_stopped = threading.Event()
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._end_s = sent_s + limits.local_lease_s

    @classmethod
    def none_yet(cls, limits: TimeLimits) -> WorkerLease:
        """An expired lease: what a process has before its first registration."""
        lease = cls("", limits=limits, sent_s=-math.inf)
        lease.runs_stopped.set()
        return lease

    def remaining_s(self) -> float:
        """Seconds until this process must have stopped acting; 0 if the lease has expired."""
        with self._lock:
            left = self._end_s - self._clock()
            if left <= 0:
                self._end_s = -math.inf
            return max(left, 0.0)

    @property
    def end_s(self) -> float:
        """When the lease expires, by its clock; a time in the past if it has expired."""
        with self._lock:
            return max(self._end_s, EXPIRED_S)

    def confirm_within_s(self) -> float:
        """How long the code of the runs may take to stop after the end."""
        return self._limits.confirm_s

    def renewed(self, sent_s: float) -> None:
        """Extend the lease after Redis has confirmed a renewal that was sent at `sent_s`."""
        with self._lock:
            if self._end_s > self._clock():
                self._end_s = sent_s + self._limits.local_lease_s

    def give_up(self) -> None:
        """End the lease for ever."""
        with self._lock:
            self._end_s = -math.inf
