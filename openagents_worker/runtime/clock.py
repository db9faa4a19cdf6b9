"""The clocks of a run: how long it has been active, how much of its limit is left, the time of Redis."""

from __future__ import annotations

import asyncio
import time

from openagents_worker.errors import BudgetExhausted

__all__ = ["RedisClock", "RunClock"]


class RedisClock:
    """The clock of Redis, as of the claim and the time since then. All stored times come from that clock."""

    def __init__(self, now_ms: int) -> None:
        """`now_ms` is the time of Redis when the run was claimed, ms since 1970."""
        self._loop = asyncio.get_running_loop()
        self._ahead_ms = now_ms - self._loop.time() * 1000

    def now_ms(self) -> int:
        return int(self._loop.time() * 1000 + self._ahead_ms)


class RunClock:
    """Measures the active time of a run. Time in which the run was suspended is not counted."""

    def __init__(self, limit_ms: int | None, active_ms: int) -> None:
        """`active_ms` is the active time of the earlier attempts."""
        self.limit_ms = limit_ms
        """None: no limit."""
        self._active_ms = active_ms
        self._started = time.monotonic()

    @property
    def active_ms(self) -> int:
        return self._active_ms + round((time.monotonic() - self._started) * 1000)

    def left_s(self) -> float | None:
        """Seconds left of the limit; None without a limit."""
        if self.limit_ms is None:
            return None
        return max(0.0, (self.limit_ms - self._active_ms) / 1000 - (time.monotonic() - self._started))

    def extend(self, limit_ms: float | None) -> None:
        """Raise the limit to this one, unless it is larger already or there is none."""
        if self.limit_ms is not None and limit_ms is not None:
            self.limit_ms = max(self.limit_ms, round(limit_ms))

    def exhausted(self, limit_ms: int | None = None) -> BudgetExhausted:
        """The error for a run that has used up its time. `limit_ms`: another limit than that of the clock."""
        limit = limit_ms or self.limit_ms or 0
        return BudgetExhausted(
            f"Run duration limit ({limit}ms) exceeded", kind="duration", current=self.active_ms, limit=limit
        )
