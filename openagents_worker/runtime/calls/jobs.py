"""Jobs in the background: the only place that starts the job of a tool call and waits for its end.

The handle of the job is stored before anything else happens (`CallInfo.note`), so a later attempt of the call
asks for this job in place of starting another one. Between two questions the run is parked. A job whose call
ends before it is cancelled: here if the pattern cancels the call, by `worker.open_jobs` if the run ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from openagents_worker.errors import (
    OpenAgentsError,
    PermanentToolError,
    ToolCancelledError,
    ToolError,
    ToolTimeoutError,
)
from openagents_worker.models import WaitKind
from openagents_worker.runtime.calls.guards.intent import begin_effect
from openagents_worker.runtime.calls.interrupted import RecordedOutcome
from openagents_worker.runtime.calls.tool_call import ToolCall
from openagents_worker.runtime.user_code import cancelling_itself_only, coded, described_in_log, tool_error
from openagents_worker.store.facts import Fact, FactKind
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.jobs import DEFAULT_JOB_LIMIT, JobHandle, JobStatus, handle_of, status_of

__all__ = ["CANCEL_S", "run_job"]

log = get_logger(__name__)
T = TypeVar("T")

REQUEST_S = 60.0  # one start or one question; the job itself may take days
CANCEL_S = 3.0  # a pattern that cancels the call waits at most so long for the service
FIRST_POLL_MS = 1_000
LAST_POLL_MS = 300_000
PART_OF_AGE = 4  # a job that takes an hour is known to have ended after a quarter of an hour at the latest


@dataclass(frozen=True, slots=True)
class _StartedJob:
    """A job that was started. Times are those of the clock of Redis, in ms since 1970."""

    handle: JobHandle
    started_ms: int
    life: int

    def to_json(self, call: ToolCall) -> dict[str, Any]:
        """The note of the call: how to find the job again. `worker.open_jobs` reads it, too."""
        toolset_id = getattr(call.tool.plugin, "toolset_id", None)
        return {
            "handle": self.handle.model_dump(mode="json"),
            "tool_id": call.tool_id,
            **({} if toolset_id is None else {"toolset_id": toolset_id}),
            "key": call.info.idempotency_key,
            "started_ms": self.started_ms,
            "life": self.life,
        }


async def run_job(call: ToolCall) -> Any:
    """The result of the job of a call. Raises the coded error of a job that has failed."""
    job = _stored_job(call)
    if job is not None:
        await _continue_wait(call, job)
    while True:
        started = job or await _start_job(call)
        if not isinstance(started, _StartedJob):
            return started
        call.has_job = True
        status = await _wait_for_end(call, started)
        is_of_earlier_life = started.life < call.run.context.recorder.life
        if not (is_of_earlier_life and status.status == "cancelled"):
            return _outcome(call, started, status)
        job = None  # cancelled when the life ended that had started it: start another one


async def _wait_for_end(call: ToolCall, job: _StartedJob) -> JobStatus:
    """The state in which the job has ended. It is cancelled if nobody else can do that."""
    try:
        return await _poll_until_end(call, job)
    except asyncio.CancelledError:
        await _cancel_if_given_up(call, job)
        raise


async def _cancel_if_given_up(call: ToolCall, job: _StartedJob) -> None:
    """Cancel the job if the run goes on without this call, or leaves no note of the job."""
    if not call.run.context.recorder.is_latched or not call.info.may_suspend:
        await _cancel(call, job)


# --- the start ----------------------------------------------------------------------------------------------


def _stored_job(call: ToolCall) -> _StartedJob | None:
    """The job that an earlier attempt of this call has started."""
    note = call.info.noted
    if note is None:
        return None
    handle, started_ms, life = note.get("handle"), note.get("started_ms"), note.get("life")
    if not isinstance(handle, dict) or not isinstance(started_ms, int) or not isinstance(life, int):
        return None  # another program has written it
    return _StartedJob(handle_of(handle, call.tool_id), started_ms, life)


async def _start_job(call: ToolCall) -> Any:
    """The job, started now. If the call has effects and was interrupted before: its known outcome."""
    known = await begin_effect(call)
    if known is not None:
        outcome = known.outcome()
        if isinstance(outcome, RecordedOutcome) or not isinstance(outcome, JobHandle):
            return outcome
        handle = handle_of(outcome, call.tool_id)  # `reconcile` has found the job
    else:
        plugin = call.tool.plugin
        returned = await _request(call, "start", lambda: plugin.invoke_background(call.params, call.context))
        handle = handle_of(returned, call.tool_id)
    recorder = call.run.context.recorder
    job = _StartedJob(handle, recorder.waits.clock.now_ms(), recorder.life)
    _emit(call, job, "submitted")
    if call.info.note is not None:
        try:
            await call.info.note(job.to_json(call))
        except asyncio.CancelledError:
            await _cancel_if_given_up(call, job)
            raise
    call.run.writer.closed_at_suspend.discard(_wait_fact(call))  # this call does not begin again
    return job


# --- waiting ------------------------------------------------------------------------------------------------


async def _poll_until_end(call: ToolCall, job: _StartedJob) -> JobStatus:
    """Ask for the job until it has ended. A retryable error means that its state is not known yet."""
    clock, limit_ms = call.run.context.recorder.waits.clock, _limit_ms(call)
    while True:
        after_ms: int | None = None
        try:
            status = await _poll(call, job)
        except OpenAgentsError as error:
            if not error.retryable:
                await _cancel(call, job)
                raise
            log.info("tool.job_not_polled", **_ids(call, job), **described_in_log(error))
            after_ms = getattr(error, "retry_after_ms", None)
            _emit(call, job, "polled", status="unknown", error=error.code)
        else:
            if status.status not in ("pending", "running"):
                _report_end(call, job, status.status)
                return status
            after_ms = status.poll_after_ms
            progress = {} if status.progress is None else {"progress": status.progress}
            _emit(call, job, "polled", status=status.status, **progress)
        age_ms = clock.now_ms() - job.started_ms
        if age_ms >= limit_ms:
            await _cancel(call, job)
            raise ToolTimeoutError(
                f"the job {job.handle.job_id!r} of {call.tool_id!r} took longer than {limit_ms:,} ms",
                call.tool_id,
                hint="timeout_ms of the tool in the agents file limits the time of its jobs",
            )
        await _wait(call, min(_delay_ms(age_ms, after_ms), limit_ms - age_ms))


async def _poll(call: ToolCall, job: _StartedJob) -> JobStatus:
    """The state of the job. Raises a coded error."""
    try:
        plugin = call.tool.plugin
        answer = await _request(call, "state", lambda: plugin.poll_job(job.handle, call.context))
        return status_of(answer, call.tool_id)
    except Exception as error:
        coded_error = coded(error, tool_error(ToolError, call.tool_id))
        if coded_error is error:
            raise
        raise coded_error from error


async def _wait(call: ToolCall, delay_ms: int) -> None:
    """Wait in Redis. The run is parked, unless something else of it is executed meanwhile."""
    waits = call.run.context.recorder.waits
    await waits.until(call.info, WaitKind.JOB, name=call.tool_id, timeout_ms=delay_ms)
    waits.facts.forget([_wait_fact(call)])  # the end of this wait must not end the next one


def _wait_fact(call: ToolCall) -> str:
    return Fact(FactKind.WAIT, call.info.call_id, "").name


async def _continue_wait(call: ToolCall, job: _StartedJob) -> None:
    """Continue the wait of an earlier attempt, if this attempt began before the wait had ended."""
    recorder = call.run.context.recorder
    facts = recorder.waits.facts
    if job.life != recorder.life:  # the job was perhaps cancelled in between
        facts.forget([_wait_fact(call)])
        recorder.replaces(call.info.call_id, _wait_fact(call))
    elif (facts.stored_wait(call.info.call_id) or {}).get("kind") == WaitKind.JOB.value:
        await _wait(call, 0)


def _delay_ms(age_ms: int, asked_ms: int | None) -> int:
    """The pause before the next question: it grows with the age of the job, or is what the tool asks for."""
    if asked_ms is None:
        return min(max(FIRST_POLL_MS, age_ms // PART_OF_AGE), LAST_POLL_MS)
    return min(max(asked_ms, FIRST_POLL_MS // 10), 12 * LAST_POLL_MS)


def _limit_ms(call: ToolCall) -> int:
    return call.tool.job_limit_ms or round(DEFAULT_JOB_LIMIT.total_seconds() * 1000)


def _outcome(call: ToolCall, job: _StartedJob, status: JobStatus) -> Any:
    if status.status == "succeeded":
        return status.result
    what = f"the job {job.handle.job_id!r} of the tool {call.tool_id!r}"
    if status.status == "cancelled":
        raise ToolCancelledError(f"{what} was cancelled: {status.error or 'no reason given'}", call.tool_id)
    raise PermanentToolError(f"{what} has failed: {status.error or 'no reason given'}", call.tool_id)


# --- requests -----------------------------------------------------------------------------------------------


async def _request(
    call: ToolCall, what: str, work: Callable[[], Awaitable[T]], *, limit_s: float = REQUEST_S
) -> T:
    """One request of the tool to its service. Raises `ToolTimeoutError`, which is retryable."""
    timer = asyncio.timeout(limit_s)
    try:
        async with timer:
            return await cancelling_itself_only(work())
    except TimeoutError as error:
        if not timer.expired():
            raise
        raise ToolTimeoutError(
            f"the tool {call.tool_id!r} did not get the {what} of its job within {limit_s:g} s", call.tool_id
        ) from error


async def _cancel(call: ToolCall, job: _StartedJob) -> None:
    """Cancel the job, if its service answers soon. Otherwise it is cancelled when the run ends."""
    plugin = call.tool.plugin
    try:
        await _request(
            call, "cancellation", lambda: plugin.cancel_job(job.handle, call.context), limit_s=CANCEL_S
        )
    except Exception as error:  # noqa: BLE001 - code of a tool may raise anything
        log.warning("tool.job_not_cancelled", **_ids(call, job), error=type(error).__name__)
        return
    _report_end(call, job, "cancelled")


def _report_end(call: ToolCall, job: _StartedJob, status: str) -> None:
    """Emit the end of the job, and let the record of the call replace the note of the job."""
    _emit(call, job, "completed", status=status)
    if call.info.note is not None:
        name = Fact(FactKind.JOB, call.info.call_id, "").name
        call.run.context.recorder.replaces(call.info.call_id, name)


def _emit(call: ToolCall, job: _StartedJob, moment: str, **more: Any) -> None:
    ids = {"tool_id": call.tool_id, "call_id": call.info.call_id, "job_id": job.handle.job_id}
    call.run.writer.emit(f"tool.background.{moment}", {**ids, **more})


def _ids(call: ToolCall, job: _StartedJob) -> dict[str, Any]:
    return {
        "run_id": call.run.context.run_id,
        "tool_id": call.tool_id,
        "call_id": call.info.call_id,
        "job_id": job.handle.job_id,
    }
