"""Task state: the only place that reports to Celery, and so to Flower, how the work on a message ended.

The run record is authoritative; Celery's state is for display. No input or output of a run is sent.
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

WAIT_REASONS = {
    ClaimAnswer.WAITING.lower(): "waiting for session",
    ClaimAnswer.NOT_DUE.lower(): "not due yet",
    ClaimAnswer.SUSPECT_BUSY.lower(): "waiting for a worker without another suspect",
    ClaimAnswer.OTHER_FORMAT.lower(): "waiting for a worker of another version",
    ClaimAnswer.PARKED.lower(): "parked until its wake-up",
    "handover": "handover",
    "given_back": "released by its worker",
}
"""The retry reasons that Flower shows when a claim is refused for now, by the reason of the claim."""


END_EVENTS: Mapping[RunState, tuple[str, Mapping[str, Any]]] = {
    RunState.COMPLETED: ("task-succeeded", {}),
    RunState.FAILED: ("task-failed", {}),
    RunState.CANCELLED: ("task-revoked", {"terminated": True, "signum": None, "expired": False}),
}
"""Celery's event for each final state of a run, and the fields of the event that are constant."""


def report_to_celery(task: Task, run_id: str, attempt_result: AttemptResult) -> dict[str, str]:
    """Return for SUCCESS; raise `RunFailed` for FAILURE, `Retry` for a waiting run, `Ignore` otherwise.

    No message is published: a waiting run continues by its own wake-ups.
    """
    match attempt_result.kind:
        case AttemptOutcome.FINISHED:
            return _report_end(task, run_id, attempt_result)
        case AttemptOutcome.SUSPENDED:
            return _raise_retry(attempt_result.reason, attempt_result.delay_ms)
        case AttemptOutcome.SKIPPED if attempt_result.reason in WAIT_REASONS:
            return _raise_retry(WAIT_REASONS[attempt_result.reason], None)
        case AttemptOutcome.SKIPPED:
            raise Ignore(f"the run {run_id} was not executed: {attempt_result.reason}")
        case _:
            assert_never(attempt_result.kind)


def _report_end(task: Task, run_id: str, attempt_result: AttemptResult) -> dict[str, str]:
    reason = attempt_result.stop_reason or StopReason.FAILED
    if reason is StopReason.COMPLETED:
        return {"run_id": run_id, "stop_reason": reason.value}
    if reason is StopReason.CANCELLED:
        _raise_revoked(task, run_id)
    code = attempt_result.error.code if attempt_result.error is not None else f"execution.{reason}"
    failed = RunFailed(f"{code}: the run ended as {reason}", code=code, run_id=run_id)
    raise failed.showing(None if attempt_result.error is None else attempt_result.error.traceback) from None


def _raise_revoked(task: Task, run_id: str) -> Never:
    """Send the event of a revocation, store REVOKED, and raise `Ignore`."""
    # Celery's tracer cannot return REVOKED, so the event is sent here.
    event, fields = END_EVENTS[RunState.CANCELLED]
    task.send_event(event, **fields)
    if not (task.ignore_result or task.request.is_eager):
        task.backend.mark_as_revoked(run_id, "cancelled", request=task.request, store_result=True)
    raise Ignore("cancelled")


def _raise_retry(reason: str, delay_ms: int | None) -> Never:
    """Raises the `Retry` that Celery shows for a waiting run."""
    # Celery's event and Flower show `exc`; Celery's log shows `message`.
    raise Retry(message=reason, exc=reason, when=None if delay_ms is None else delay_ms / 1000)
