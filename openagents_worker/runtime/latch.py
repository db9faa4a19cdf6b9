"""The latch of a run: once set, no recorded call starts, and every one of them raises the latch again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum

from openagents_worker.errors import OpenAgentsError

__all__ = ["Latch", "LatchReason", "RunLatched"]


class LatchReason(StrEnum):
    """Why a run stops here without having ended by itself."""

    FENCED = "fenced"  # somebody else has it, or our lease is over: nothing may be written any more
    CANCELLED = "cancelled"
    TIME_LIMIT = "time_limit"  # its time is over, by its budget or by Celery's soft limit: it ends as failed
    RETRY = "retry"  # a retryable error: go on later
    LEFT_TO_OTHERS = "left_to_others"  # this worker cannot execute it, another one can: go on there
    HANDOVER = "handover"  # this worker stops: go on elsewhere, at once


_RANK = {
    LatchReason.HANDOVER: 0,
    LatchReason.RETRY: 1,
    LatchReason.LEFT_TO_OTHERS: 2,
    LatchReason.TIME_LIMIT: 3,
    LatchReason.CANCELLED: 4,
    LatchReason.FENCED: 5,
}


class RunLatched(BaseException):
    """What a recorded call raises once its run is latched.

    Not an `Exception`: a pattern that catches errors to try something else must not catch this one. And if
    it does all the same, the runner trusts the latch, not what the pattern returned.
    """

    def __init__(self, reason: LatchReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Latch:
    """Set once or raised to a graver reason; never taken back."""

    def __init__(self) -> None:
        self.reason: LatchReason | None = None
        self.error: OpenAgentsError | None = None
        self.call = ""
        self.detail = ""
        self.is_set: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stop_now = asyncio.Event()
        self._when_fenced: list[Callable[[], None]] = []

    def set(
        self, reason: LatchReason, *, error: OpenAgentsError | None = None, call: str = "", detail: str = ""
    ) -> None:
        if self.reason is not None and _RANK[self.reason] >= _RANK[reason]:
            return
        self.reason, self.error, self.call, self.detail = reason, error, call, detail
        if not self.is_set.done():
            self.is_set.set_result(None)
        if not self.lets_calls_end:
            self._stop_now.set()
        if reason is LatchReason.FENCED:
            callbacks, self._when_fenced = self._when_fenced, []
            for callback in callbacks:
                callback()

    def when_fenced(self, callback: Callable[[], None]) -> None:
        """Call this as soon as nothing may be written any more, once."""
        self._when_fenced.append(callback)

    @property
    def lets_calls_end(self) -> bool:
        """Whether calls that run may end and be recorded before the run is put aside."""
        return self.reason in (LatchReason.RETRY, LatchReason.LEFT_TO_OTHERS, LatchReason.HANDOVER)

    def hurry(self) -> None:
        """Calls that run are not waited for any longer; a run that is handed over makes them again."""
        self._stop_now.set()

    async def wait(self) -> None:
        await asyncio.wait([self.is_set])

    async def wait_stop_now(self) -> None:
        """Returns when running calls are to be cancelled rather than awaited."""
        await self._stop_now.wait()
