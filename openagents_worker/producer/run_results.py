"""Results of runs. The only place that turns the record of a run into what Celery shows of a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from celery import exceptions, states
from pydantic import BaseModel, ValidationError

from openagents_worker.errors import OutputValidationError, RecordUnreadable, RunFailed
from openagents_worker.models import RunRecord, RunResult, RunState, instance_of, run_failed
from openagents_worker.producer import plans
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.store.client import Plan

__all__ = [
    "CELERY_STATES",
    "WaitTimeout",
    "failed",
    "parsed_result",
    "ready",
    "result_of_get",
    "result_or_error",
    "state",
    "successful",
    "timeout_of_wait",
    "traceback_of",
]

CELERY_STATES: Mapping[RunState, str] = {
    RunState.SCHEDULED: states.PENDING,
    RunState.QUEUED: states.PENDING,
    RunState.WAITING_SESSION: states.PENDING,
    RunState.RUNNING: states.STARTED,
    RunState.RETRYING: states.RETRY,
    RunState.AWAITING_APPROVAL: states.RETRY,
    RunState.WAITING_CHILD: states.RETRY,
    RunState.WAITING: states.RETRY,
    RunState.PAUSED: states.RETRY,
    RunState.COMPLETED: states.SUCCESS,
    RunState.FAILED: states.FAILURE,
    RunState.CANCELLED: states.REVOKED,
}


class WaitTimeout(exceptions.TimeoutError, TimeoutError):  # type: ignore[misc]  # Celery ships no types
    """The run did not end within the timeout; it continues.

    The class inherits from the `TimeoutError` of Celery and of Python.
    """


def parsed_result(record: RunRecord, output_class: type[BaseModel] | None) -> RunResult[Any]:
    """The result of a run that has ended, with its answer as an instance of `output_class`."""
    result = _result_of(record)
    if output_class is None or not result.ok:
        return result
    try:
        answer = instance_of(output_class, result.final_output)
    except ValidationError as error:
        raise OutputValidationError(
            f"the answer matches the schema of {output_class.__name__}, but the class rejects it: {error}",
            hint="use register_output: the worker then checks answers with the class and can retry",
            output_type=output_class.__name__,
            run_id=record.run_id,
        ) from error
    return result.model_copy(update={"final_output": answer})


def result_or_error(record: RunRecord) -> dict[str, Any] | RunFailed:
    """The value that `get` returns or raises for a run that has ended."""
    result = _result_of(record)
    if record.state is RunState.COMPLETED:
        return result.model_dump(mode="json")
    return run_failed(result, agent_id=record.agent_id, session_id=record.session_id)


def _result_of(record: RunRecord) -> RunResult[Any]:
    """The result of a run that has ended. Raises `RecordUnreadable` if another program has removed it."""
    if record.result is None:
        raise RecordUnreadable(
            f"the run {record.run_id!r} has ended as {record.state}, but its record has no result",
            hint="another program may have removed it; its events may still say how it ended",
            run_id=record.run_id,
            session_id=record.session_id,
        )
    return record.result


def result_of_get(record: RunRecord, propagate: bool) -> Any:
    """The value that `get` returns for a run that has ended. Raises `RunFailed` with `propagate`."""
    value = result_or_error(record)
    if isinstance(value, RunFailed) and propagate:
        raise value
    return value


@contextmanager
def timeout_of_wait(run_id: str, timeout: float | None) -> Iterator[None]:
    """Raise `WaitTimeout` instead of the `TimeoutError` of the block. `timeout` is in seconds."""
    try:
        yield
    except TimeoutError:
        raise WaitTimeout(f"the run {run_id!r} did not end within {timeout} s; it continues") from None


def state(publishing: PublishingApp, run_id: str) -> Plan[str]:
    """Celery's name of the state of the run. Raises `RunNotFound`."""
    return CELERY_STATES[(yield from plans.record(publishing, run_id)).state]


def ready(publishing: PublishingApp, run_id: str) -> Plan[bool]:
    """Whether the run has ended. Raises `RunNotFound`."""
    return (yield from plans.record(publishing, run_id)).state.is_terminal


def successful(publishing: PublishingApp, run_id: str) -> Plan[bool]:
    """Whether the run has completed. Raises `RunNotFound`."""
    return (yield from plans.record(publishing, run_id)).state is RunState.COMPLETED


def failed(publishing: PublishingApp, run_id: str) -> Plan[bool]:
    """Whether the run has failed. Raises `RunNotFound`."""
    return (yield from plans.record(publishing, run_id)).state is RunState.FAILED


def traceback_of(record: RunRecord) -> str | None:
    """The traceback of the user's code that ended the run; None without one."""
    details = None if record.result is None else record.result.error_details
    return None if details is None else details.traceback
