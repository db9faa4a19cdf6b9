"""The runner of a worker process: claims runs and carries each in an attempt, all on one event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextvars import copy_context
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
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.attempt import Attempt, AttemptOutcome, AttemptResult
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.lease import Lease
from openagents_worker.runtime.marks import Executing, Marks, marked
from openagents_worker.runtime.stops import Stops
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.formats import WRITTEN, translate_parse_errors
from openagents_worker.store.records import check_task_options, parse_request
from openagents_worker.store.scripts import ClaimAnswer, Claimed, ReleaseKind, Wake
from openagents_worker.telemetry.logs import get_logger

__all__ = ["AttemptResult", "AttemptOutcome", "Runner"]

log = get_logger(__name__)


class Runner:
    """Carries the runs of one process.

    `lease` gives the current lease; `send_wakes` sends wake-up messages. Nothing here knows Celery.
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
        """`leave` ends the process, with this exit code, when code of a run cannot be stopped. In `marks`
        stands whose code executes."""
        self.accepting = True
        self._store = store
        self._lease = lease
        self._assembly = assembly
        self._settings = settings
        self._send_wakes = send_wakes
        self._claim_patience_s = settings.time_limits.claim_patience_s
        self._leave = leave
        self._marks = marks or Marks()
        self._claiming: dict[str, int] = {}
        self._attempts: dict[str, Attempt] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._stops = Stops()

    async def execute(self, run_id: str, format_: int = WRITTEN) -> AttemptResult:
        """Claim a run and carry it as far as it goes here. Never raises for what happens inside the run.

        `format_` is that of the message which asks for it.
        """
        with _Entry(self._claiming, run_id):
            lease, claimed = await self._claim(run_id, format_)
            if claimed.answer is not ClaimAnswer.CLAIMED:
                if claimed.wakes:
                    await self._send_wakes(claimed.wakes)
                attempt_result = _not_claimed(claimed)
                _log_foreign_end(run_id, claimed, attempt_result)
                return attempt_result
            if lease.remaining_s() <= 0:  # nothing is begun here: others may take the run at any moment
                return await self._give_back(run_id, lease, claimed, ReleaseKind.HANDOVER)
            if not self.accepting:
                return await self._give_back(run_id, lease, claimed, ReleaseKind.HANDOVER)
            return await self._attempt(run_id, lease, claimed)

    async def _attempt(self, run_id: str, lease: Lease, claimed: Claimed) -> AttemptResult:
        """Carry a claimed run to an end that is written, whatever happens."""
        try:
            attempt = await self._made(run_id, lease, claimed)
        except Exception:  # Redis is away, for example
            log.exception("run.not_begun", run_id=run_id)
            return await self._give_back(run_id, lease, claimed, ReleaseKind.LOST)
        self._attempts[run_id] = attempt
        self._idle.clear()
        context = copy_context()
        context.run(marked.set, attempt.mark)
        work = self._marked(self._to_its_end(attempt, run_id, lease, claimed))
        executing = asyncio.create_task(work, name=f"attempt {run_id}", context=context)
        try:
            return await _awaited(executing, attempt)
        finally:
            if self._attempts.get(run_id) is attempt:
                del self._attempts[run_id]
            if not self._attempts:
                self._idle.set()

    async def _made(self, run_id: str, lease: Lease, claimed: Claimed) -> Attempt:
        """The attempt at a run. Where its request cannot be read, it has the run's ids in its place."""
        request, unreadable = self._request(run_id, lease, claimed)
        if unreadable is not None:
            log.of_run(logging.ERROR, "run.request_unreadable", run_id=run_id, error=unreadable.message)
        return Attempt(
            claimed,
            request or await self._ids_of(run_id),
            store=self._store,
            lease=lease,
            assembly=self._assembly,
            settings=self._settings,
            send_wakes=self._send_wakes,
            leave=self._leave,
            marks=self._marks,
            unreadable=unreadable,
        )

    def _request(
        self, run_id: str, lease: Lease, claimed: Claimed
    ) -> tuple[RunRequest | None, OpenAgentsError | None]:
        """The run's request, or why it cannot be read."""
        before = self._marks.loop_begins(
            Executing(run_id, incarnation=lease.incarnation, kind="runtime", name="request").to_mark()
        )
        try:
            check_task_options(run_id, claimed.canvas)
            return parse_request(run_id, claimed.request), None
        except (OtherFormat, RecordUnreadable) as error:
            return None, error
        finally:
            self._marks.loop_begins(before)

    async def _ids_of(self, run_id: str) -> RunRequest:
        key = self._store.keys("run", run_id)
        agent_id, session_id = await self._store.ask(lambda r: r.hmget(key, "agent", "session"))
        return RunRequest.model_construct(
            agent_id=agent_id or "", session_id=session_id or "", run_id=run_id, input_text=""
        )

    async def _marked(self, work: Coroutine[Any, Any, AttemptResult]) -> AttemptResult:
        return await self._marks.steps(work)

    async def _to_its_end(
        self, attempt: Attempt, run_id: str, lease: Lease, claimed: Claimed
    ) -> AttemptResult:
        try:
            attempt_result = await attempt.execute()
        except asyncio.CancelledError:  # the loop ends
            raise
        except BaseException:  # an error of ours: the run is given back, and that is counted
            log.exception("run.internal_error", run_id=run_id, agent_id=attempt.request.agent_id)
            return await self._give_back(run_id, lease, claimed, ReleaseKind.LOST)
        if attempt.is_abandoned:
            return await self._give_back(run_id, lease, claimed, ReleaseKind.LOST)
        if isinstance(attempt.latch.error, RedisRefused):  # it goes on from its last checkpoint
            error = attempt.latch.error
            log.of_run(
                logging.ERROR, "run.write_refused", run_id=run_id, error=error.message, hint=error.hint
            )
            await self._give_back(run_id, lease, claimed, ReleaseKind.LOST)
        return attempt_result

    async def _claim(self, run_id: str, format_: int) -> tuple[Lease, Claimed]:
        """Ask until there is an answer: with one nonce, so that a lost answer is given once more."""
        give_up_at = time.monotonic() + self._claim_patience_s
        while True:
            lease = self._lease()
            if lease.remaining_s() <= 0 and self.accepting and time.monotonic() <= give_up_at:
                await asyncio.sleep(0.05)  # not registered: the heartbeat is about to become an incarnation
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
            is_to_be_asked_again = claimed.answer is ClaimAnswer.NOT_ALIVE and self.accepting
            if not is_to_be_asked_again or time.monotonic() > give_up_at:
                return lease, claimed
            await asyncio.sleep(0.05)  # the heartbeat is about to register a new incarnation

    async def _give_back(
        self, run_id: str, lease: Lease, claimed: Claimed, kind: ReleaseKind
    ) -> AttemptResult:
        """Release a run that we have claimed. Where Redis is away its lease ends, and others take it."""
        door = scripts.release(
            run_id=run_id,
            incarnation=lease.incarnation,
            fence=claimed.fence,
            kind=kind,
            max_recoveries=self._settings.max_recoveries,
        )
        try:
            released = await self._store.run_until(door, lambda: lease.remaining_s() <= 0)
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
        """Runs that this process claims or carries; may be asked from any thread."""
        return frozenset(self._claiming.copy())

    def owned_runs(self) -> frozenset[str]:
        """Those of them whose claim has been answered: they are ours; may be asked from any thread."""
        return frozenset(self._attempts.copy())

    def latch(self, run_id: str, reason: LatchReason, detail: str = "") -> None:
        """Stop a run of this process; call it on the loop."""
        attempt = self._attempts.get(run_id)
        if attempt is not None:
            self._stop(attempt, reason, detail)

    def _stop(self, attempt: Attempt, reason: LatchReason, detail: str) -> None:
        if reason is LatchReason.FENCED:  # others may have the run: it stops before anything else happens
            attempt.latch.set(reason, detail=detail)
        else:
            self._stops.call(lambda: attempt.latch.set(reason, detail=detail))

    def interrupt(self, run_id: str, by: Exception) -> None:
        """A soft time limit of Celery's is over: the run stops and ends with it; call it on the loop."""
        attempt = self._attempts.get(run_id)
        if attempt is not None:
            self._stops.call(lambda: attempt.interrupt(by))

    def what_runs(self) -> list[dict[str, Any]]:
        """What of the runs still executes here, one line a run for the log."""
        return [attempt.what_runs() for attempt in list(self._attempts.values())]

    def note(self, run_id: str, name: str, payload: Mapping[str, Any]) -> None:
        """Store an event on a run of this process; call it on the loop."""
        attempt = self._attempts.get(run_id)
        if attempt is not None:
            attempt.note(name, payload)

    async def latch_all(self, reason: LatchReason, detail: str = "") -> None:
        """Stop every run of this process; returns when all have let go."""
        for attempt in list(self._attempts.values()):
            self._stop(attempt, reason, detail)
        await self._idle.wait()

    async def hurry_all(self) -> None:
        """Cancel the calls of runs that are to be handed over; returns when all have been."""
        for attempt in list(self._attempts.values()):
            self._stops.call(attempt.latch.hurry)
        await self._idle.wait()


async def _awaited(executing: asyncio.Task[AttemptResult], attempt: Attempt) -> AttemptResult:
    """The outcome of an attempt. What interrupts us meanwhile is passed on to the attempt, which stops in its
    own way; a cancellation goes on once it has stopped."""
    interruption: BaseException | None = None
    while not executing.done():
        try:
            await asyncio.wait({executing})
        except GeneratorExit:  # we are thrown away with the loop
            executing.cancel()
            raise
        except BaseException as error:  # noqa: BLE001 - raised again below
            attempt.interrupt(error)
            interruption = (
                error if interruption is None or isinstance(interruption, Exception) else interruption
            )
    attempt_result = executing.result()
    if interruption is not None and not isinstance(interruption, Exception):
        raise interruption
    return attempt_result


def _not_claimed(claimed: Claimed) -> AttemptResult:
    """What a claim that gave no work says of the run: its end, where nobody else has told or will tell it."""
    match claimed.answer:
        case ClaimAnswer.CANCELLED:
            return AttemptResult(AttemptOutcome.FINISHED, stop_reason=StopReason.CANCELLED, life=claimed.life)
        case ClaimAnswer.DONE if claimed.unnotified_result:
            return _foreign_end(claimed)
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
            raise ValueError("a run that was claimed is carried")
        case _:
            assert_never(claimed.answer)


def _foreign_end(claimed: Claimed) -> AttemptResult:
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
"""With these a run ends in Redis, while no worker works on it; other failures their worker has logged."""


def _log_foreign_end(run_id: str, claimed: Claimed, attempt_result: AttemptResult) -> None:
    """A run that was ended in Redis is logged by the worker that tells Celery of it."""
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


class _Entry:
    """Counts a run as known for as long as the block runs; two messages of one run may be in it at once."""

    def __init__(self, counts: dict[str, int], run_id: str) -> None:
        self._counts, self._run_id = counts, run_id

    def __enter__(self) -> None:
        self._counts[self._run_id] = self._counts.get(self._run_id, 0) + 1

    def __exit__(self, *_: object) -> None:
        self._counts[self._run_id] -= 1
        if self._counts[self._run_id] == 0:
            del self._counts[self._run_id]
