"""The outcome. The only place that says to Celery, and so to Flower, how a message's work ended.

The truth is the run record; this is what people see beside it. Nothing here holds an input or an output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Never, assert_never

from celery import Task
from celery.exceptions import Ignore, Retry

from openagents_worker.errors import RunFailed
from openagents_worker.models import RunState, StopReason
from openagents_worker.runtime.attempt import AttemptOutcome, AttemptResult
from openagents_worker.store.scripts import ClaimAnswer

__all__ = ["END_EVENTS", "report_to_celery"]

GOES_ON = {
    ClaimAnswer.WAITING.lower(): "waiting for session",
    ClaimAnswer.NOT_DUE.lower(): "not due yet",
    ClaimAnswer.SUSPECT_BUSY.lower(): "waiting for a worker without another suspect",
    ClaimAnswer.OTHER_FORMAT.lower(): "waiting for a worker of another version",
    ClaimAnswer.PARKED.lower(): "waiting for what it is parked on",
    "handover": "handover",
    "given_back": "given back by its worker",
}
"""What a message that found nothing to do yet says of the run; of all others the run itself says more."""


END_EVENTS: Mapping[RunState, tuple[str, Mapping[str, Any]]] = {
    RunState.COMPLETED: ("task-succeeded", {}),
    RunState.FAILED: ("task-failed", {}),
    RunState.CANCELLED: ("task-revoked", {"terminated": True, "signum": None, "expired": False}),
}
"""Celery's event for each way in which a run can end, and the fields that do not come from the run."""


def report_to_celery(task: Task, run_id: str, attempt_result: AttemptResult) -> dict[str, str]:
    """Return for SUCCESS; raise `RunFailed` for FAILURE, `Retry` for a run that waits, `Ignore` for the rest.

    None of them publishes a message: what goes on, goes on by the run's own wake-ups.
    """
    match attempt_result.kind:
        case AttemptOutcome.FINISHED:
            return _ended(task, run_id, attempt_result)
        case AttemptOutcome.SUSPENDED:
            return _goes_on(attempt_result.reason, attempt_result.delay_ms)
        case AttemptOutcome.SKIPPED if attempt_result.reason in GOES_ON:
            return _goes_on(GOES_ON[attempt_result.reason], None)
        case AttemptOutcome.SKIPPED:
            raise Ignore(f"nothing to do for run {run_id}: {attempt_result.reason}")
        case _:
            assert_never(attempt_result.kind)


def _ended(task: Task, run_id: str, attempt_result: AttemptResult) -> dict[str, str]:
    reason = attempt_result.stop_reason or StopReason.FAILED
    if reason is StopReason.COMPLETED:
        return {"run_id": run_id, "stop_reason": reason.value}
    if reason is StopReason.CANCELLED:
        _revoked(task, run_id)
    code = attempt_result.error.code if attempt_result.error is not None else f"execution.{reason}"
    failed = RunFailed(f"{code}: the run ended as {reason}", code=code, run_id=run_id)
    raise failed.showing(None if attempt_result.error is None else attempt_result.error.traceback) from None


def _revoked(task: Task, run_id: str) -> Never:
    # The tracer has no outcome that is REVOKED, so the event that shows it is sent from here.
    event, fields = END_EVENTS[RunState.CANCELLED]
    task.send_event(event, **fields)
    if not (task.ignore_result or task.request.is_eager):
        task.backend.mark_as_revoked(run_id, "cancelled", request=task.request, store_result=True)
    raise Ignore("cancelled")


def _goes_on(reason: str, delay_ms: int | None) -> Never:
    # Celery's event and Flower show `exc`, its log the message.
    raise Retry(message=reason, exc=reason, when=None if delay_ms is None else delay_ms / 1000)
