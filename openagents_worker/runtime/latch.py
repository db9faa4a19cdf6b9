"""The latch: the only place that says whether an attempt must stop, and why.

Once it is set, no recorded call begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum

from openagents_worker.errors import OpenAgentsError
from openagents_worker.store.parking import Park

__all__ = ["Latch", "LatchReason", "RunLatched", "RunTransferred"]


class LatchReason(StrEnum):
    """Why an attempt stops before the run has ended by itself."""

    FENCED = "fenced"  # another worker owns the run, or the lease is over: no write is allowed
    CANCELLED = "cancelled"
    TIME_LIMIT = "time_limit"  # of its budget, or the soft limit of its Celery task: the run fails
    RETRY = "retry"  # a retryable error: continue later
    LEFT_TO_OTHERS = "left_to_others"  # this worker cannot execute the run, another one may
    PARKED = "parked"  # it waits for a fact or a time, and nothing else of it can go on
    HANDOVER = "handover"  # this worker stops: continue on another one at once


_RANK = {
    LatchReason.PARKED: 0,
    LatchReason.HANDOVER: 1,
    LatchReason.RETRY: 2,
    LatchReason.LEFT_TO_OTHERS: 3,
    LatchReason.TIME_LIMIT: 4,
    LatchReason.CANCELLED: 5,
    LatchReason.FENCED: 6,
}


class RunLatched(BaseException):
    """Raised by recorded calls once the run is latched.

    It is not an `Exception`, so that a pattern with `except Exception` does not catch it. If a pattern does
    catch it, the latch decides, not the result of the pattern.
    """

    def __init__(self, reason: LatchReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class RunTransferred(BaseException):
    """Raised by `transfer` once the other agent has ended: the run ends with its result.

    It is not an `Exception`, so that a pattern with `except Exception` does not catch it.
    """


class Latch:
    """Stops an attempt. It can be set again only for a graver reason, and is never reset."""

    def __init__(self) -> None:
        self.reason: LatchReason | None = None
        self.error: OpenAgentsError | None = None
        self.call = ""
        self.detail = ""
        self.park: Park | None = None
        """How the run is parked; set with the reason `PARKED`."""
        self.is_set: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.when_set: Callable[[], object] = lambda: None
        """Called once, when the first reason is set."""
        self._stop_now = asyncio.Event()
        self._when_fenced: list[Callable[[], None]] = []

    def set(
        self, reason: LatchReason, *, error: OpenAgentsError | None = None, call: str = "", detail: str = ""
    ) -> None:
        """Set the reason, unless an equal or more severe one is set."""
        if self.reason is not None and _RANK[self.reason] >= _RANK[reason]:
            return
        is_first = self.reason is None
        self.reason, self.error, self.call, self.detail = reason, error, call, detail
        if is_first:
            self.when_set()
        if not self.is_set.done():
            self.is_set.set_result(None)
        if not self.lets_calls_end:
            self._stop_now.set()
        if reason is LatchReason.FENCED:
            callbacks, self._when_fenced = self._when_fenced, []
            for callback in callbacks:
                callback()

    def set_parked(self, park: Park) -> None:
        """Stop because the run waits, unless it stops already."""
        if self.reason is None:
            self.park = park
            self.set(LatchReason.PARKED)

    def when_fenced(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the reason becomes `FENCED`; never if it is `FENCED` already."""
        self._when_fenced.append(callback)

    @property
    def lets_calls_end(self) -> bool:
        """Whether calls in progress may end and be recorded before the run is suspended."""
        return self.reason in (
            LatchReason.PARKED,
            LatchReason.RETRY,
            LatchReason.LEFT_TO_OTHERS,
            LatchReason.HANDOVER,
        )

    def gives_up_calls(self) -> bool:
        """Whether a call that is being cancelled now will not be made again by a later attempt: its pattern
        has cancelled it, or the run ends."""
        return self.reason in (None, LatchReason.CANCELLED, LatchReason.TIME_LIMIT)

    def hurry(self) -> None:
        """Cancel calls in progress instead of waiting for them. The next attempt makes them again."""
        self._stop_now.set()

    async def wait(self) -> None:
        """Wait until the latch is set, for any reason."""
        await asyncio.wait([self.is_set])

    async def wait_stop_now(self) -> None:
        """Wait until calls in progress must be cancelled."""
        await self._stop_now.wait()
