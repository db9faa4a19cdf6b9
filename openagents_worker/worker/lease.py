"""The lease, by this process's own clock. The only place that says whether the process may still act."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

__all__ = ["MARGIN", "WorkerLease", "boot_clock"]

# A fifth of the lease is kept back for letting go: the local end comes before the one that Redis knows.
MARGIN = 0.2


def boot_clock() -> float:
    """Seconds that also pass while the machine sleeps; nobody can set this clock back."""
    source = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(source)


class WorkerLease:
    """One incarnation's word that it is alive. Once over it stays over, whatever Redis may answer later.

    `let_go` is set when every run has let go after the end.
    """

    def __init__(
        self, incarnation: str, *, lease_s: float, sent_s: float, clock: Callable[[], float] = boot_clock
    ) -> None:
        self.incarnation = incarnation
        self.let_go = threading.Event()
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        self._end_s = sent_s + lease_s * (1 - MARGIN)

    @classmethod
    def none_yet(cls) -> WorkerLease:
        """What a process holds before its first registration: nothing."""
        lease = cls("", lease_s=0, sent_s=-math.inf)
        lease.let_go.set()
        return lease

    def remaining_s(self) -> float:
        """Seconds until this process must have stopped acting; 0: it is over for ever."""
        with self._lock:
            left = self._end_s - self._clock()
            if left <= 0:
                self._end_s = -math.inf
            return max(left, 0.0)

    def confirm_within_s(self) -> float:
        """How long the runs may take to let go: until Redis, too, thinks the lease over. At least a second,
        for when it is over already: then nothing can be written any more, and calls are being cancelled."""
        return max(self._lease_s * MARGIN, 1.0)

    def renewed(self, sent_s: float) -> None:
        """A renewal that was sent at `sent_s` has been answered well."""
        with self._lock:
            if self._end_s > self._clock():
                self._end_s = sent_s + self._lease_s * (1 - MARGIN)

    def give_up(self) -> None:
        with self._lock:
            self._end_s = -math.inf
