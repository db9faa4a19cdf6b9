"""Parting: the only place that says how an attempt leaves a run that did not end by itself, per latch reason.

| latch reason | what is written | when the run continues |
|---|---|---|
| `parked` | suspended, `run.waiting` | when a fact or the time ends one of its waits |
|  | a fact has arrived meanwhile: as `handover` | at once, on any worker |
| `handover` | suspended, `run.handed_over` | at once, on another worker |
| `retry` | suspended until due; counts a try of the call | when due, up to `max_resume_attempts` times |
| `left_to_others` | suspended, longer each time | on a worker that can execute it |
|  | after `left_to_others_max_s`: failed, `agent.unavailable` | never |
| `time_limit` | failed, with the error of the latch | never |
| `cancelled` | cancelled; if another run has interrupted it, with the turn so far in its session | never |
| `fenced` | nothing: another worker owns the run, or will recover it | on that worker |

A write can find out that the run was cancelled, or that another worker owns it. Then the latch has a graver
reason, and the attempt ends for that reason.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from openagents_worker.errors import AgentUnavailable, OpenAgentsError
from openagents_worker.models import ErrorDetails, StopReason
from openagents_worker.quick_init import quick_init
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.user_code import described_in_log
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.scripts import SuspendKind, WriteAnswer, WriteResult
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.signals import count

__all__ = ["AttemptOutcome", "AttemptResult", "Parting"]

log = get_logger(__name__)

UNAVAILABLE_RETRY_MS = 500
"""First delay for a run whose agent this worker cannot serve; another process often can."""


class AttemptOutcome(StrEnum):
    """How an attempt has ended: the run has ended, is suspended, or is not executed here any further."""

    FINISHED = "finished"
    SUSPENDED = "suspended"
    SKIPPED = "skipped"


@quick_init
@dataclass(frozen=True, slots=True)
class AttemptResult:
    """The result of executing a run in this process.

    `reason` says why it is suspended or skipped: the answer of the claim in lower case, an error code,
    `handover`, `given_back` or `fenced`. `life` is the number of the run's life.
    """

    kind: AttemptOutcome
    reason: str = ""
    stop_reason: StopReason | None = None
    delay_ms: int | None = None
    error: ErrorDetails | None = None
    life: int = 1


class Parting:
    """Ends an attempt whose latch is set."""

    def __init__(
        self,
        latch: Latch,
        writer: RunWriter,
        *,
        finish: Callable[[OpenAgentsError], Awaitable[AttemptResult]],
        send_wakes: Callable[[WriteResult], Awaitable[None]],
        back_off_ms: Callable[[OpenAgentsError, str], int],
        cancel: Callable[[], Awaitable[AttemptResult]],
        left_max_ms: int,
    ) -> None:
        """`finish` ends the run with an error, `cancel` as cancelled. `back_off_ms` delays a retry."""
        self._latch = latch
        self._writer = writer
        self._finish = finish
        self._send_wakes = send_wakes
        self._back_off_ms = back_off_ms
        self._cancel = cancel
        self._left_max_ms = left_max_ms

    async def leave(self) -> AttemptResult:
        """End the attempt for the reason of the latch, or for a graver one that is set meanwhile."""
        while True:
            reason = self._latch.reason
            try:
                attempt_result = await self._leave_for(reason)
            except RunLatched:
                attempt_result = None
            if attempt_result is not None:
                return attempt_result
            if self._latch.reason is reason:
                self._latch.set(LatchReason.FENCED, detail=f"nothing could be written for {reason}")

    async def _leave_for(self, reason: LatchReason | None) -> AttemptResult | None:
        """The result of the attempt; None if the latch now has another reason."""
        match reason:
            case LatchReason.PARKED:
                return await self._park()
            case LatchReason.HANDOVER:
                return await self._hand_over()
            case LatchReason.RETRY:
                return await self._retry_later()
            case LatchReason.LEFT_TO_OTHERS:
                return await self._leave_to_others()
            case LatchReason.TIME_LIMIT:
                return await self._finish(self._error)
            case LatchReason.CANCELLED:
                return await self._cancel()
            case LatchReason.FENCED:
                log.of_run(
                    logging.WARNING, "run.fenced", run_id=self._writer.run_id, detail=self._latch.detail
                )
                return AttemptResult(AttemptOutcome.SKIPPED, "fenced")
            case None:
                raise RuntimeError("the latch of the run is not set")
            case _:
                assert_never(reason)

    @property
    def _error(self) -> OpenAgentsError:
        assert self._latch.error is not None, f"the latch has the reason {self._latch.reason} but no error"
        return self._latch.error

    async def _park(self) -> AttemptResult | None:
        park = self._latch.park
        assert park is not None, "the latch has the reason parked but does not say how"
        reply = await self._writer.suspend(
            kind=SuspendKind.PARK, delay_ms=0, call="", error_code="", park=park
        )
        if reply.answer is not WriteAnswer.OK:
            return None
        await self._send_wakes(reply)
        is_handed_over = reply.wakes and not park.limit
        for kind in () if is_handed_over else {wait.kind for wait in park.waits}:
            count("openagents.runs.parked", 1, {"openagents.wait.kind": kind.value})
        return AttemptResult(AttemptOutcome.SUSPENDED, "handover" if is_handed_over else park.reason)

    async def _hand_over(self) -> AttemptResult | None:
        reply = await self._writer.suspend(kind=SuspendKind.HANDOVER, delay_ms=0, call="", error_code="")
        if reply.answer is not WriteAnswer.OK:
            return None
        await self._send_wakes(reply)
        return AttemptResult(AttemptOutcome.SUSPENDED, "handover")

    async def _retry_later(self) -> AttemptResult | None:
        error, call = self._error, self._latch.call
        reply = await self._writer.suspend(
            kind=SuspendKind.RETRY,
            delay_ms=self._back_off_ms(error, call),
            call=call,
            error_code=error.code,
            error_details=_error_summary(error),
        )
        return await self._suspended_result(reply, error)

    async def _leave_to_others(self) -> AttemptResult | None:
        error = self._error
        reply = await self._writer.suspend(
            kind=SuspendKind.LEFT_TO_OTHERS,
            delay_ms=UNAVAILABLE_RETRY_MS if isinstance(error, AgentUnavailable) else 0,
            call="",
            error_code=error.code,
            left_max_ms=self._left_max_ms,
            error_details=_error_summary(error),
        )
        if reply.answer is WriteAnswer.OVERDUE:
            unavailable = AgentUnavailable(
                f"no worker could execute the run within {self._left_max_ms / 1000:,.0f} s: {error.message}",
                hint=(error.hint if isinstance(error, AgentUnavailable) else None)
                or "start a worker that has the agent, in the version that the run needs",
            )
            unavailable.__cause__ = error
            return await self._finish(unavailable)
        return await self._suspended_result(reply, error)

    async def _suspended_result(self, reply: WriteResult, error: OpenAgentsError) -> AttemptResult | None:
        """Log the suspension, send the wake-ups and return the result; None if it was refused."""
        if reply.answer is not WriteAnswer.OK:
            return None
        run_id, fields = self._writer.run_id, described_in_log(error)
        if self._latch.reason is LatchReason.RETRY:
            count("openagents.runs.retried", 1, {"error.type": error.code})
            log.warning("run.retry_scheduled", run_id=run_id, **fields, delay_ms=reply.delay_ms)
        else:
            log.of_run(logging.WARNING, "run.left_to_others", run_id=run_id, **fields)
        await self._send_wakes(reply)
        return AttemptResult(
            AttemptOutcome.SUSPENDED,
            error.code,
            delay_ms=reply.delay_ms,
            error=ErrorDetails.from_exception(error),
        )


SUMMARY_CHARS = 500  # of a message or hint: listing runs reads the whole record


def _error_summary(error: OpenAgentsError) -> str:
    """The error of a suspended run as its record shows it: JSON with code, message and hint."""
    details = ErrorDetails.from_exception(error, depth=1)
    shortened = {
        "message": details.message[:SUMMARY_CHARS],
        "hint": details.hint and details.hint[:SUMMARY_CHARS],
    }
    return details.model_copy(update={**shortened, "context": {}}).model_dump_json(exclude_defaults=True)
