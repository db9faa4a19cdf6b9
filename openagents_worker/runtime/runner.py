"""The runner: the only place that claims runs and executes them, all on one event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, assert_never

from openagents_worker.errors import (
    AgentUnavailable,
    OpenAgentsError,
    OtherFormat,
    RecordUnreadable,
    RedisRefused,
    RedisUnreachable,
    RedisWrongType,
    RunPoisoned,
    WorkerLost,
)
from openagents_worker.models import ErrorDetails, RunRequest, RunResult, StopReason
from openagents_worker.runtime.agent_parts import AgentOfRun
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.attempt import Attempt, AttemptOutcome, AttemptResult
from openagents_worker.runtime.facts import read_facts
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.lease import Lease
from openagents_worker.runtime.marks import Marks, mark_of, run_prefix
from openagents_worker.runtime.services import Services
from openagents_worker.runtime.spans import attempt_span, count_claim, end_attempt_span
from openagents_worker.runtime.stops import Stops
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.formats import WRITTEN, translate_parse_errors
from openagents_worker.store.records import check_task_options, parse_request
from openagents_worker.store.scripts import ClaimAnswer, Claimed, ReleaseKind, Wake
from openagents_worker.telemetry.logs import get_logger

__all__ = ["AttemptOutcome", "AttemptResult", "Runner"]

log = get_logger(__name__)


class Runner:
    """Executes the runs of one process. It does not depend on Celery.

    `lease` returns the current lease of the process. `send_wakes` sends wake-up messages.
    """

    def __init__(
        self,
        *,
        store: AsyncStore,
        lease: Callable[[], Lease],
        assembly: Assembly,
        settings: Settings,
        send_wakes: Callable[[Sequence[Wake]], Awaitable[None]],
        leave: Callable[[int], object] = os._exit,
        marks: Marks | None = None,
    ) -> None:
        """`leave(exit_code)` ends the process when code of a run cannot be stopped.

        `marks` shows another process which code executes.
        """
        self.accepting = True
        self._store = store
        self._lease = lease
        self._settings = settings
        self._services = Services(store, assembly, settings, send_wakes, leave, marks or Marks())
        self._send_wakes = send_wakes
        self._claim_patience_s = settings.time_limits.claim_patience_s
        self._claiming: dict[str, int] = {}
        self._attempts: dict[str, Attempt] = {}
        self._early_facts: dict[str, int] = {}
        """Facts of runs that are being claimed, whose attempts do not exist yet."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._stops = Stops()

    async def execute(self, run_id: str, format_: int = WRITTEN) -> AttemptResult:
        """Claim a run and execute it until it ends, is suspended or is lost. Never raises errors of the run.

        `format_` is the record format that the wake-up message asks for.
        """
        with _CountedClaim(self._claiming, run_id, self._early_facts):
            lease, claimed = await self._claim(run_id, format_)
            count_claim(claimed.answer)
            if claimed.answer is not ClaimAnswer.CLAIMED:
                return await self._skip(run_id, claimed)
            try:
                attempt = await self._new_attempt(run_id, lease, claimed)
            except Exception:  # for example, Redis cannot be reached
                log.exception("run.not_begun", run_id=run_id)
                return await self._release(run_id, lease, claimed, ReleaseKind.LOST)
            # Without an await before `_own`: a worker that stops, or loses its lease, knows owned runs only.
            if lease.remaining_s() <= 0 or not self.accepting:
                self._services.assembly.keeper.release(attempt.agent.kept)
                return await self._release(run_id, lease, claimed, ReleaseKind.HANDOVER)
            self._own(run_id, attempt)
            try:
                began_s = time.monotonic()
                try:
                    with attempt_span(attempt.request, claimed) as span:
                        attempt_result: AttemptResult | None = end_attempt_span(
                            span, attempt.request, await attempt.execute(), claimed, began_s=began_s
                        )
                except (asyncio.CancelledError, GeneratorExit):  # the event loop is being closed
                    raise
                except BaseException:  # a bug in this library
                    log.exception("run.internal_error", run_id=run_id, agent_id=attempt.request.agent_id)
                    attempt_result = None
                attempt_result = await self._release_if_lost(attempt, attempt_result, lease, claimed)
            finally:
                self._disown(run_id, attempt)
            if attempt.supervision.interruption is not None:
                raise attempt.supervision.interruption
            return attempt_result

    async def _skip(self, run_id: str, claimed: Claimed) -> AttemptResult:
        """The result for a claim that was refused."""
        if claimed.wakes:
            await self._send_wakes(claimed.wakes)
        attempt_result = _result_without_claim(claimed)
        _log_end_without_worker(run_id, claimed, attempt_result)
        return attempt_result

    def _own(self, run_id: str, attempt: Attempt) -> None:
        """The run counts as owned by this process from now on."""
        self._attempts[run_id] = attempt
        self._idle.clear()
        attempt.facts.announce(self._early_facts.pop(run_id, 0))

    def _disown(self, run_id: str, attempt: Attempt) -> None:
        """The attempt has ended."""
        if self._attempts.get(run_id) is attempt:
            del self._attempts[run_id]
        self._services.assembly.keeper.release(attempt.agent.kept)
        if not self._attempts:
            self._idle.set()

    async def _new_attempt(self, run_id: str, lease: Lease, claimed: Claimed) -> Attempt:
        """The attempt at a run. If the request cannot be read, the attempt gets one with only its ids."""
        if claimed.facts is None:  # they are too large for the answer
            claimed = replace(claimed, facts=await read_facts(self._store, run_id))
        request, request_error = self._parse_request(run_id, lease, claimed)
        if request_error is not None:
            log.of_run(logging.ERROR, "run.request_unreadable", run_id=run_id, error=request_error.message)
        request = request or await self._request_with_ids_only(run_id)
        assembly, kept = self._services.assembly, None
        if request_error is None:
            kept = await assembly.keeper.of_run(
                claimed, request.agent_id, run_id, own=assembly, store=self._store, lease=lease
            )
        agent = AgentOfRun(request.agent_id, assembly, kept, request_error)
        try:
            return Attempt(claimed, request, services=self._services, lease=lease, agent=agent)
        except BaseException:
            assembly.keeper.release(kept)
            raise

    def _parse_request(
        self, run_id: str, lease: Lease, claimed: Claimed
    ) -> tuple[RunRequest | None, OpenAgentsError | None]:
        """The request of the run, or the error that says why it cannot be read."""
        prefix = run_prefix(run_id, "", lease.incarnation)
        before = self._services.marks.mark_loop(mark_of(prefix, "runtime", "request"))
        try:
            check_task_options(run_id, claimed.canvas)
            return parse_request(run_id, claimed.request), None
        except (OtherFormat, RecordUnreadable) as error:
            return None, error
        finally:
            self._services.marks.mark_loop(before)

    async def _request_with_ids_only(self, run_id: str) -> RunRequest:
        """A request with only the ids of the run, for a run whose request cannot be read."""
        key = self._store.keys("run", run_id)
        agent_id, session_id = await self._store.ask(lambda r: r.hmget(key, "agent", "session"))
        return RunRequest.model_construct(
            agent_id=agent_id or "", session_id=session_id or "", run_id=run_id, input_text=""
        )

    async def _release_if_lost(
        self, attempt: Attempt, attempt_result: AttemptResult | None, lease: Lease, claimed: Claimed
    ) -> AttemptResult:
        """Release the run if the attempt could not write how it leaves it. Counts as a recovery.

        `attempt_result` is None if the attempt failed with a bug of this library.
        """
        run_id, refused = attempt.request.run_id, attempt.latch.error
        if attempt_result is not None and not attempt.supervision.is_abandoned:
            if not isinstance(refused, RedisRefused):
                return attempt_result
            # The run continues from its last checkpoint.
            log.of_run(
                logging.ERROR, "run.write_refused", run_id=run_id, error=refused.message, hint=refused.hint
            )
        released = await attempt.supervision.uninterrupted(
            lambda: self._release(run_id, lease, claimed, ReleaseKind.LOST), name="release"
        )
        return released if attempt_result is None or attempt.supervision.is_abandoned else attempt_result

    async def _claim(self, run_id: str, format_: int) -> tuple[Lease, Claimed]:
        """Claim the run.

        Waits up to `claim_patience_s` while the process has no lease or Redis does not answer.

        After a lost reply the same command is repeated. It has the same nonce, so it returns the same claim.
        """
        give_up_at = time.monotonic() + self._claim_patience_s
        while True:
            lease = self._lease()
            if lease.remaining_s() <= 0 and self.accepting and time.monotonic() <= give_up_at:
                await asyncio.sleep(0.05)  # the heartbeat is about to register the process
                continue
            call = scripts.claim(
                run_id=run_id,
                incarnation=lease.incarnation,
                nonce=secrets.token_hex(8),
                page_bytes=scripts.PAGE_BYTES,
                message_format=format_,
                left_max_ms=round(self._settings.left_to_others_max_s * 1000),
            )
            try:
                claimed = await self._store.run_until(call, lambda: time.monotonic() > give_up_at)
            except RedisUnreachable as error:
                log.of_run(logging.WARNING, "run.claim_failed", run_id=run_id, error=error.message)
                return lease, Claimed(ClaimAnswer.UNKNOWN)
            lease_not_registered = claimed.answer is ClaimAnswer.NOT_ALIVE and self.accepting
            if not lease_not_registered or time.monotonic() > give_up_at:
                return lease, claimed
            await asyncio.sleep(0.05)  # the heartbeat is about to register a new incarnation

    async def _release(self, run_id: str, lease: Lease, claimed: Claimed, kind: ReleaseKind) -> AttemptResult:
        """Release a claimed run. If Redis cannot be reached, its lease ends and other workers recover it."""
        call = scripts.release(
            run_id=run_id,
            incarnation=lease.incarnation,
            fence=claimed.fence,
            kind=kind,
            max_recoveries=self._settings.max_recoveries,
        )
        try:
            released = await self._store.run_until(call, lambda: lease.remaining_s() <= 0)
        except RedisUnreachable as error:
            hint = "the heartbeat releases it"
            log.of_run(logging.WARNING, "run.not_released", run_id=run_id, error=error.message, hint=hint)
            return AttemptResult(AttemptOutcome.SKIPPED, "fenced")
        await self._send_wakes(released.wakes)
        match kind:
            case ReleaseKind.HANDOVER:
                return AttemptResult(AttemptOutcome.SKIPPED, "handover")
            case ReleaseKind.LOST:
                return AttemptResult(AttemptOutcome.SKIPPED, "given_back")
            case _:
                assert_never(kind)

    # --- for the heartbeat -------------------------------------------------------------------------------

    def known(self) -> frozenset[str]:
        """The runs that this process is claiming or executing. Can be called from any thread."""
        return frozenset(self._claiming.copy())

    def owned_runs(self) -> frozenset[str]:
        """The runs that this process has claimed. Can be called from any thread."""
        return frozenset(self._attempts.copy())

    def latch(self, run_id: str, reason: LatchReason, detail: str = "") -> None:
        """Stop a run of this process. Must be called on the event loop."""
        attempt = self._attempts.get(run_id)
        if attempt is not None:
            self._set_latch(attempt, reason, detail)

    def _set_latch(self, attempt: Attempt, reason: LatchReason, detail: str) -> None:
        if reason is LatchReason.FENCED:  # another worker may own the run: stop it before anything else
            attempt.latch.set(reason, detail=detail)
        else:
            self._stops.call(lambda: attempt.latch.set(reason, detail=detail))

    def announce_fact(self, run_id: str, number: int) -> None:
        """There is a fact about a run of this process. Must be called on the event loop."""
        attempt = self._attempts.get(run_id)
        if attempt is not None:
            attempt.facts.announce(number)
        elif run_id in self._claiming:
            self._early_facts[run_id] = number

    def interrupt(self, run_id: str, by: Exception) -> None:
        """Stop a run whose Celery task exceeded its soft time limit `by`. It ends as failed.

        Must be called on the event loop.
        """
        attempt = self._attempts.get(run_id)
        if attempt is not None:
            self._stops.call(lambda: attempt.interrupt(by))

    def code_in_progress(self) -> list[dict[str, Any]]:
        """The code of each run that still executes, as fields of a log line."""
        return [attempt.code_in_progress() for attempt in list(self._attempts.values())]

    def emit(self, run_id: str, name: str, payload: Mapping[str, Any]) -> None:
        """Emit an event of a run of this process. Must be called on the event loop."""
        attempt = self._attempts.get(run_id)
        if attempt is not None:
            attempt.emit(name, payload)

    async def latch_all(self, reason: LatchReason, detail: str = "") -> None:
        """Stop every run of this process. Returns when all attempts have ended."""
        for attempt in list(self._attempts.values()):
            self._set_latch(attempt, reason, detail)
        await self._idle.wait()

    async def hurry_all(self) -> None:
        """Cancel the calls in progress of runs that are handed over. Returns when all attempts have ended."""
        for attempt in list(self._attempts.values()):
            self._stops.call(attempt.latch.hurry)
        await self._idle.wait()


def _result_without_claim(claimed: Claimed) -> AttemptResult:
    """The result for a claim that was refused. If Celery was not yet notified of the end, it is that end."""
    match claimed.answer:
        case ClaimAnswer.CANCELLED:
            return AttemptResult(AttemptOutcome.FINISHED, stop_reason=StopReason.CANCELLED, life=claimed.life)
        case ClaimAnswer.DONE if claimed.unnotified_result:
            return _result_of_ended_run(claimed)
        case (
            ClaimAnswer.DONE
            | ClaimAnswer.WAITING
            | ClaimAnswer.BUSY
            | ClaimAnswer.NOT_DUE
            | ClaimAnswer.NOT_ALIVE
            | ClaimAnswer.UNKNOWN
            | ClaimAnswer.SUSPECT_BUSY
            | ClaimAnswer.OTHER_FORMAT
            | ClaimAnswer.PARKED
        ):
            return AttemptResult(AttemptOutcome.SKIPPED, claimed.answer.value.lower())
        case ClaimAnswer.CLAIMED:
            raise ValueError("the run was claimed: execute it")
        case _:
            assert_never(claimed.answer)


def _result_of_ended_run(claimed: Claimed) -> AttemptResult:
    """The result of a run that ended earlier, from its stored result."""
    try:
        with translate_parse_errors(WRITTEN):
            result = RunResult[Any].model_validate_json(claimed.unnotified_result)
    except RecordUnreadable as error:
        details = ErrorDetails.from_exception(error)
        return AttemptResult(
            AttemptOutcome.FINISHED, stop_reason=StopReason.FAILED, error=details, life=claimed.life
        )
    return AttemptResult(
        AttemptOutcome.FINISHED, stop_reason=result.stop_reason, error=result.error_details, life=claimed.life
    )


ENDED_WITHOUT_A_WORKER = frozenset(
    {AgentUnavailable.code, RedisWrongType.code, RunPoisoned.code, WorkerLost.code}
)
"""Codes of runs that a script ended, without a worker. Other failures are logged by their worker."""


def _log_end_without_worker(run_id: str, claimed: Claimed, attempt_result: AttemptResult) -> None:
    """Log the failure of a run that a script ended. The worker that notifies Celery does this."""
    error = attempt_result.error
    if error is None or error.code not in ENDED_WITHOUT_A_WORKER:
        return
    log.error(
        "run.failed",
        run_id=run_id,
        agent_id=error.context.get("agent_id"),
        session_id=error.context.get("session_id"),
        stop_reason=str(attempt_result.stop_reason),
        code=error.code,
        message=error.message,
    )


class _CountedClaim:
    """Counts a run as known inside the block, also for two messages at once. The last one clears `early`."""

    def __init__(self, counts: dict[str, int], run_id: str, early: dict[str, int]) -> None:
        self._counts, self._run_id, self._early = counts, run_id, early

    def __enter__(self) -> None:
        self._counts[self._run_id] = self._counts.get(self._run_id, 0) + 1

    def __exit__(self, *_: object) -> None:
        self._counts[self._run_id] -= 1
        if self._counts[self._run_id] == 0:
            del self._counts[self._run_id]
            self._early.pop(self._run_id, None)
