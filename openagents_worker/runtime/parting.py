"""Parting. The only place that says how an attempt ends that does not end by itself: one way out per reason.

| the latch says | what is written | when the run goes on |
|---|---|---|
| `handover` | suspended, `run.handed_over` | at once, on another worker |
| `retry` | suspended until it is due, a try of its call | then, `max_resume_attempts` times |
| `left_to_others` | suspended for ever longer times | on a worker that can execute it |
|  | and in the end: failed, `agent.unavailable` | never |
| `time_limit` | the end: failed, with the latch's error | never |
| `cancelled` | the end: cancelled | never |
| `fenced` | nothing: another worker has it, or will take it | there |

A write may find that the run is to be cancelled, or is no longer ours: then the latch has been raised to that
reason, and the run parts by it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from openagents_worker.errors import AgentUnavailable, OpenAgentsError, RunCancelled
from openagents_worker.models import ErrorDetails, StopReason
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.user_code import described_in_log
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.scripts import SuspendKind, WriteAnswer, WriteResult
from openagents_worker.telemetry.logs import get_logger

__all__ = ["AttemptResult", "AttemptOutcome", "Parting"]

log = get_logger(__name__)

NOT_SERVED_MS = 500
"""How soon a run is looked at again whose agent its worker cannot serve: the one beside it often can."""


class AttemptOutcome(StrEnum):
    """What became of a run in this process."""

    FINISHED = "finished"
    SUSPENDED = "suspended"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """The outcome of carrying a run. `reason` is the claim's answer, a retry's error code, or `handover`.

    `life` is which of the run's lives has ended.
    """

    kind: AttemptOutcome
    reason: str = ""
    stop_reason: StopReason | None = None
    delay_ms: int | None = None
    error: ErrorDetails | None = None
    life: int = 1


class Parting:
    """The end of an attempt whose latch is set."""

    def __init__(
        self,
        latch: Latch,
        ledger: RunWriter,
        *,
        finish: Callable[[OpenAgentsError], Awaitable[AttemptResult]],
        send: Callable[[WriteResult], Awaitable[None]],
        back_off_ms: Callable[[OpenAgentsError, str], int],
        why_cancelled: Callable[[], Awaitable[str]],
        left_max_ms: int,
    ) -> None:
        """`finish` ends the run with an error; `back_off_ms` says when a call is tried again after one."""
        self._latch = latch
        self._ledger = ledger
        self._finish = finish
        self._send = send
        self._back_off_ms = back_off_ms
        self._why_cancelled = why_cancelled
        self._left_max_ms = left_max_ms

    async def leave(self) -> AttemptResult:
        """Part by the latch's reason; by a graver one where the latch is raised meanwhile."""
        while True:
            reason = self._latch.reason
            try:
                attempt_result = await self._by(reason)
            except RunLatched:
                attempt_result = None
            if attempt_result is not None:
                return attempt_result
            if self._latch.reason is reason:
                self._latch.set(LatchReason.FENCED, detail=f"nothing could be written for {reason}")

    async def _by(self, reason: LatchReason | None) -> AttemptResult | None:
        """What became of the run; None when the latch has been raised to another reason."""
        match reason:
            case LatchReason.HANDOVER:
                return await self._hand_over()
            case LatchReason.RETRY:
                return await self._retry_later()
            case LatchReason.LEFT_TO_OTHERS:
                return await self._leave_to_others()
            case LatchReason.TIME_LIMIT:
                return await self._finish(self._error)
            case LatchReason.CANCELLED:
                return await self._finish(RunCancelled(await self._why_cancelled()))
            case LatchReason.FENCED:
                log.of_run(
                    logging.WARNING, "run.fenced", run_id=self._ledger.run_id, detail=self._latch.detail
                )
                return AttemptResult(AttemptOutcome.SKIPPED, "fenced")
            case None:
                raise RuntimeError("a run parts whose latch is not set")
            case _:
                assert_never(reason)

    @property
    def _error(self) -> OpenAgentsError:
        assert self._latch.error is not None, f"latched for {self._latch.reason} without an error"
        return self._latch.error

    async def _hand_over(self) -> AttemptResult | None:
        handed = await self._ledger.suspend(kind=SuspendKind.HANDOVER, delay_ms=0, call="", error_code="")
        if handed.answer is not WriteAnswer.OK:
            return None
        await self._send(handed)
        return AttemptResult(AttemptOutcome.SUSPENDED, "handover")

    async def _retry_later(self) -> AttemptResult | None:
        error, call = self._error, self._latch.call
        handed = await self._ledger.suspend(
            kind=SuspendKind.RETRY,
            delay_ms=self._back_off_ms(error, call),
            call=call,
            error_code=error.code,
            error_details=_for_people(error),
        )
        return await self._put_aside(handed, error)

    async def _leave_to_others(self) -> AttemptResult | None:
        error = self._error
        handed = await self._ledger.suspend(
            kind=SuspendKind.LEFT_TO_OTHERS,
            delay_ms=NOT_SERVED_MS if isinstance(error, AgentUnavailable) else 0,
            call="",
            error_code=error.code,
            left_max_ms=self._left_max_ms,
            error_details=_for_people(error),
        )
        if handed.answer is WriteAnswer.OVERDUE:
            unavailable = AgentUnavailable(
                f"no worker that can execute the run came within {self._left_max_ms / 1000:,.0f} s: "
                f"{error.message}",
                hint=(error.hint if isinstance(error, AgentUnavailable) else None)
                or "start a worker that has the agent, in the version that the run needs",
            )
            unavailable.__cause__ = error
            return await self._finish(unavailable)
        return await self._put_aside(handed, error)

    async def _put_aside(self, handed: WriteResult, error: OpenAgentsError) -> AttemptResult | None:
        if handed.answer is not WriteAnswer.OK:
            return None
        run_id, said = self._ledger.run_id, described_in_log(error)
        if self._latch.reason is LatchReason.RETRY:
            log.warning("run.retry_scheduled", run_id=run_id, **said, delay_ms=handed.delay_ms)
        else:
            log.of_run(logging.WARNING, "run.left_to_others", run_id=run_id, **said)
        await self._send(handed)
        return AttemptResult(
            AttemptOutcome.SUSPENDED,
            error.code,
            delay_ms=handed.delay_ms,
            error=ErrorDetails.from_exception(error),
        )


SHOWN_CHARS = 500  # of a message: the record is read whole by everybody who lists runs


def _for_people(error: OpenAgentsError) -> str:
    """What the record says of the error while the run waits: code, message and hint."""
    details = ErrorDetails.from_exception(error, depth=1)
    shown = {"message": details.message[:SHOWN_CHARS], "hint": details.hint and details.hint[:SHOWN_CHARS]}
    return details.model_copy(update={**shown, "context": {}}).model_dump_json(exclude_defaults=True)
