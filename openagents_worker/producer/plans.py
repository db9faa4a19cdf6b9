"""Plans of client operations. The only place that defines how clients submit, resume, fork and cancel runs.

Both clients execute these. The docstring of a plan that is a method of a client is that of the method.
Besides scripts and reads, the steps of a plan are seconds to wait (a float) and messages to send (`Sending`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

from celery import Celery
from typing_extensions import Unpack

from openagents_worker.arguments import optional_text, text_of_caller
from openagents_worker.errors import OpenAgentsError, RedisUnreachable, RedisWrongType, RequestInvalid
from openagents_worker.models import RunRecord, RunState
from openagents_worker.producer.publisher import send_first, send_wakes
from openagents_worker.producer.publishing_app import PublishingApp
from openagents_worker.producer.task_options import task_options_json
from openagents_worker.redaction import shown_reason
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.client import Plan
from openagents_worker.store.list_states import CompareBy
from openagents_worker.store.listing import MAX_LIMIT, RunFilter, RunFilters, list_runs
from openagents_worker.store.plan import Emit
from openagents_worker.store.records import record_plan, run_not_found
from openagents_worker.store.scripts import CancelAnswer
from openagents_worker.submission.fork import fork_session as copy_of_session
from openagents_worker.submission.submit import (
    Accepted,
    ForkOptions,
    Request,
    forking,
    resumption,
    submission,
)
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.signals import with_traceparent

__all__ = [
    "RESUMABLE",
    "ClientOptions",
    "Sending",
    "cancel",
    "fork",
    "fork_session",
    "record",
    "resume",
    "resume_all",
    "revoke",
    "submit",
]

SEND_WITHIN_S = 1.5  # publishing may take three more seconds, and a submission at most five

log = get_logger(__name__)

RESUMABLE = (RunState.FAILED, RunState.CANCELLED)
"""The states of runs that have ended and can have another life."""


@dataclass(frozen=True, slots=True)
class Sending:
    """A step that sends messages. It blocks, so the async client executes it in a thread."""

    send: Callable[[], object]


class ClientOptions(TypedDict, total=False):
    """The options of `Client.submit`."""

    queue: str | None
    delay_ms: int
    expires_ms: int
    priority: int | None
    headers: Mapping[str, Any] | None
    canvas: Mapping[str, Any] | None


def submit(
    publishing: PublishingApp,
    request: Request,
    *,
    queue: str | None = None,
    delay_ms: int = 0,
    expires_ms: int = 0,
    priority: int | None = None,
    headers: Mapping[str, Any] | None = None,
    canvas: Mapping[str, Any] | None = None,
) -> Plan[str]:
    """Submit a run and send its message. Returns the id of the run."""
    started_s = time.monotonic()
    app, settings = publishing.to_submit()
    accepted = yield from submission(
        request,
        settings,
        queue=queue,
        delay_ms=delay_ms,
        expires_ms=expires_ms,
        canvas=_task_options(settings, canvas, priority=priority, headers=headers),
    )
    yield Sending(partial(_send_accepted, app, accepted, started_s))
    return accepted.run_id


def resume(publishing: PublishingApp, run_id: str, by: str | None) -> Plan[str]:
    """Start another life of a run and send its message. Returns the id of the run."""
    started_s, by = time.monotonic(), optional_text("by", by)
    app, settings = publishing.to_submit()
    run = yield from record(publishing, run_id)
    accepted = yield from resumption(run, settings, by=by or "")
    yield Sending(partial(_send_accepted, app, accepted, started_s))
    return accepted.run_id


def fork(
    publishing: PublishingApp, of_run: str, checkpoint_id: str, /, **options: Unpack[ForkOptions]
) -> Plan[str]:
    """Create a run from a checkpoint of a run, and send its message. Returns the id of the new run."""
    started_s, of_run = time.monotonic(), text_of_caller("of_run", of_run)
    if text_of_caller("checkpoint_id", checkpoint_id).rpartition(":step:")[0] != of_run:
        raise RequestInvalid(
            f"the checkpoint {checkpoint_id[:200]!r} is not one of the run {of_run[:200]!r}",
            hint=f"the checkpoints of this run have the form '{of_run[:200]}:step:{{n}}'",
        )
    app, settings = publishing.to_submit()
    accepted = yield from forking(publishing.keys, settings, checkpoint_id, **options)
    yield Sending(partial(_send_accepted, app, accepted, started_s))
    return accepted.run_id


def fork_session(_: PublishingApp, session_id: str, new_session_id: str | None = None) -> Plan[str]:
    """Copy the transcript, the artifacts and the state of a session. Returns the id of the new session.

    Raises `SessionNotFound`, `RequestInvalid`, or `RunConflict` if the new session exists.
    """
    return copy_of_session(session_id, new_session_id)


def cancel(publishing: PublishingApp, run_id: str, reason: str | None = None) -> Plan[CancelAnswer]:
    """Cancel a run. Raises `RunNotFound`.

    CANCELLED: it was cancelled at once. REQUESTED: its worker will cancel it. ALREADY: it had ended before.
    """
    # The script also wakes the run that gets the session.
    cancelled = yield scripts.cancel(
        run_id=text_of_caller("run_id", run_id),
        reason=shown_reason(optional_text("reason", reason)),
        force=False,
    )
    if cancelled.answer is CancelAnswer.UNKNOWN:
        raise run_not_found(run_id)
    if cancelled.wakes:
        yield Sending(partial(publishing.send_wakes, cancelled.wakes))
    answer: CancelAnswer = cancelled.answer
    return answer


def revoke(publishing: PublishingApp, run_id: str) -> Plan[None]:
    """Cancel the run. Raises `RunNotFound`."""
    yield from cancel(publishing, run_id, "revoked")


def record(publishing: PublishingApp, run_id: str) -> Plan[RunRecord]:
    """The current record of the run. Raises `RunNotFound`."""
    return (yield from record_plan(publishing.keys, text_of_caller("run_id", run_id)))


def resume_all(
    publishing: PublishingApp, filters: RunFilters, *, by: str | None, dry_run: bool
) -> Plan[None]:
    """Resume the runs that match the filters, newest first, and emit their ids.

    The default of `state` is failed. With `dry_run` nothing is resumed. Raises `RequestInvalid`, also for a
    state other than failed and cancelled, and `ConfigError` if two apps are registered.
    """
    by = optional_text("by", by)
    _ = publishing.to_submit()
    filter_ = RunFilter.of(
        filters if filters.get("state") is not None else {**filters, "state": RunState.FAILED}
    )
    if others := filter_.states.difference(RESUMABLE):
        raise RequestInvalid(
            f"a run in the state {min(others)} cannot be resumed", hint="the states are failed and cancelled"
        )
    cursor: str | None = None
    while True:
        page = yield from list_runs(
            publishing.keys, filter_, limit=MAX_LIMIT, cursor=cursor, compare_by=CompareBy.SCRIPT
        )
        for run in page:
            if dry_run or (yield from _is_resumed(publishing, run.run_id, by)):
                yield Emit([run.run_id])
        if (cursor := page.next_cursor) is None:
            return


def _is_resumed(publishing: PublishingApp, run_id: str, by: str | None) -> Plan[bool]:
    try:
        yield from resume(publishing, run_id, by)
    except OpenAgentsError as error:
        if isinstance(error, RedisUnreachable) and not isinstance(error, RedisWrongType):
            raise
        log.warning("run.not_resumed", run_id=run_id, code=error.code, error=error.message, hint=error.hint)
        return False
    return True


def _send_accepted(app: Celery, accepted: Accepted, started_s: float) -> None:
    """Send the messages for an accepted run.

    If more than 1.5 seconds have passed since `started_s` (of `time.monotonic()`), they are left to the
    rescue loop of a worker, so that the caller does not wait longer.
    """
    if time.monotonic() - started_s > SEND_WITHIN_S:
        log.warning(
            "run.message_left",
            run_id=accepted.run_id,
            hint="the run is accepted; a worker will send its message",
        )
        return
    if accepted.first:
        send_first(app, accepted.first)
    if accepted.also:
        send_wakes(app, accepted.also)


def _task_options(settings: Settings, canvas: Mapping[str, Any] | None, **options: Any) -> str:
    """The task options of a submission as JSON. Raises as `task_options_json` does."""
    if canvas is not None and not isinstance(canvas, Mapping):
        raise RequestInvalid(f"canvas must be a mapping of options to values, not {type(canvas).__name__}")
    set_options = {name: value for name, value in options.items() if value is not None}
    return task_options_json(
        with_traceparent({**(canvas or {}), **set_options}),
        max_bytes=settings.max_payload_bytes,
        key_prefix=settings.key_prefix,
    )
