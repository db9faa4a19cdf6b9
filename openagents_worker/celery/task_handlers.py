"""Task handlers: the only place that executes a run for a message and records that Celery was notified."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from celery import Task, states
from celery.exceptions import Ignore
from celery.utils.time import maybe_make_aware

from openagents_worker.arguments import iso_time
from openagents_worker.celery.message import TaskMessage, parse_message, run_to_resume
from openagents_worker.celery.process_holder import CeleryProcess
from openagents_worker.celery.task_state import report_to_celery
from openagents_worker.errors import (
    OpenAgentsError,
    RedisRefused,
    RedisUnreachable,
    RunConflict,
    RunFailed,
    SubmitUnknown,
)
from openagents_worker.jsontext import is_whole
from openagents_worker.models import RunRequest, StopReason
from openagents_worker.producer.task_options import task_options_of_message
from openagents_worker.queue_names import WAKE_SUFFIX
from openagents_worker.runtime.attempt import AttemptOutcome, AttemptResult
from openagents_worker.store.dead_letters import item_as_text
from openagents_worker.store.formats import WRITTEN
from openagents_worker.store.scripts import put_aside, reject
from openagents_worker.submission.submit import SubmitOptions, asubmit
from openagents_worker.telemetry.logs import get_logger

__all__ = [
    "accept_run",
    "accepted_run",
    "completion_notified",
    "prune",
    "recover_runs",
    "report",
    "running_process",
]

log = get_logger(__name__)

REDIS_PAUSE_S = 0.5
MAX_ERROR_CHARS = 500


def accept_run(
    request: Any, process: CeleryProcess, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, int]:
    """The id of the run that a message names or requests, and the record format that the message asks for.

    `request` is Celery's request of the task. An invalid request of a run becomes a failed run. Raises
    `RunFailed` for it.
    """
    message, max_bytes = _task_message(request, args, kwargs), process.settings.max_payload_bytes
    try:
        run_id = parse_message(message, max_bytes=max_bytes)
        if isinstance(run_id, RunRequest):
            canvas = task_options_of_message(
                request, max_bytes=max_bytes, key_prefix=process.settings.key_prefix
            )
            run_id = process.run(_accept(process, run_id, message, canvas))
    except OpenAgentsError as error:
        process.run(_store_failed_run(process, message, error))
        raise RunFailed(str(error), code=error.code, run_id=message.task_id) from None
    return run_id, message.format


def accepted_run(request: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, int]:
    """The id of the accepted run that a message names, and the record format that the message asks for."""
    message = _task_message(request, args, kwargs)
    return run_to_resume(message), message.format


def recover_runs(process: CeleryProcess | None) -> int:
    """Recover every recoverable run now; returns the number of recovered runs."""
    process = running_process(process)
    return process.run(process.rescue.once())


def prune(process: CeleryProcess | None) -> int:
    """Remove expired runs and sessions from the indexes; returns the number of entries."""
    process = running_process(process)
    return process.run(process.rescue.prune())


def running_process(process: CeleryProcess | None) -> CeleryProcess:
    """The process. Raises `Ignore` if the worker is stopping."""
    if process is None:
        raise Ignore(
            "this worker is stopping; the run is stored in Redis, and another worker will execute it"
        )
    return process


# --- reporting to Celery ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _PendingCompletion:
    """The end of a run that is being reported to Celery; `status` is Celery's state for it."""

    process: CeleryProcess
    run_id: str
    life: int
    status: str


def report(
    task: Task, request: Any, process: CeleryProcess, run_id: str, attempt_result: AttemptResult
) -> dict[str, str]:
    """Report the result to Celery; remember the end so that it is acknowledged after Celery's callbacks."""
    # Only the run's own message has its callbacks. After another message they must still be called.
    if attempt_result.kind is AttemptOutcome.FINISHED and request.id == run_id:
        status = _STATUS.get(attempt_result.stop_reason or StopReason.FAILED, states.FAILURE)
        request.openagents_ending = _PendingCompletion(process, run_id, attempt_result.life, status)
    if attempt_result.kind is AttemptOutcome.SUSPENDED and request.id == run_id and not request.is_eager:
        process.check_flower_later(task, run_id)
    try:
        return report_to_celery(task, run_id, attempt_result)
    except Ignore:
        completion_notified(task, states.REVOKED)  # Celery's tracer calls no `after_return` after an Ignore
        raise


_STATUS = {StopReason.COMPLETED: states.SUCCESS, StopReason.CANCELLED: states.REVOKED}


def completion_notified(task: Task, status: str) -> None:
    """Record that Celery was notified of the end, and that the linked tasks were sent.

    If the worker dies before, another worker notifies Celery again: callbacks are called at least once. A
    `status` that is not the run's means that the report failed; then nothing is recorded.
    """
    request = task.request
    pending: _PendingCompletion | None = getattr(request, "openagents_ending", None)
    if pending is None or pending.status != status:
        return
    pending.process.completion_notified(pending.run_id, pending.life, wait=bool(request.is_eager))


# --- messages --------------------------------------------------------------------------------------------


def _task_message(request: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TaskMessage:
    """The message of a task, from Celery's request."""
    headers = request.headers or {}
    queue = (request.delivery_info or {}).get("routing_key")
    queue = queue if isinstance(queue, str) and is_whole(queue) else ""
    has_id = isinstance(request.id, str) and is_whole(request.id)
    ours = "wake_us" in headers or getattr(request, "wake_us", None) is not None
    format_ = headers.get("run_format", getattr(request, "run_format", None))
    return TaskMessage(
        request.id if has_id else f"no-id-{uuid.uuid4()}",
        args,
        kwargs,
        queue.removesuffix(WAKE_SUFFIX),
        ours,
        _ms_until(request.expires),
        has_id=has_id,
        format=format_ if ours and isinstance(format_, int) else WRITTEN,
    )


def _ms_until(expires: str | None) -> int:
    """Milliseconds until the expiry time of a message, at least 1; 0 if it does not expire."""
    if not expires:
        return 0
    at = maybe_make_aware(iso_time(expires))
    return max(1, int((at - datetime.now(UTC)).total_seconds() * 1000))


async def _accept(process: CeleryProcess, request: RunRequest, message: TaskMessage, canvas: str) -> str:
    """Accept a request from outside; returns the id of its run.

    Its message is already removed from the broker, so this waits until Redis answers. A request that Redis
    refuses is stored as a dead letter, so that it does not occupy a slot for ever. Raises `RedisRefused`
    then, and `Ignore` if another request has the same id.
    """
    options: SubmitOptions = {"canvas": canvas}
    if request.resume_from_checkpoint is None:  # else the run stays in its queue, not in that of the message
        options |= {"queue": message.queue or None, "expires_ms": message.expires_ms}
    while True:
        try:
            accepted = await asubmit(process.store, request, settings=process.settings, **options)
        except RedisRefused as error:
            await _store_dead_letter(process, request, message, error)
            raise
        except (RedisUnreachable, SubmitUnknown) as error:
            log.of_run(logging.WARNING, "message.waits_for_redis", run_id=request.run_id, error=error.message)
            await asyncio.sleep(REDIS_PAUSE_S)
        except RunConflict:
            log.warning("message.conflict", run_id=request.run_id, hint="another request has this id")
            raise Ignore(f"the run id {request.run_id} belongs to another request") from None
        else:
            await process.send_wakes(accepted.also)
            return accepted.run_id


async def _store_dead_letter(
    process: CeleryProcess, request: RunRequest, message: TaskMessage, error: RedisRefused
) -> None:
    """Store the whole request that Redis refuses as a dead letter, so that it can be submitted again.

    `openagents-worker status` lists it. If Redis refuses the dead letter too, the request is logged.
    """
    item = request.model_dump_json(exclude_unset=True)
    queue = message.queue or process.settings.queue
    script_call = put_aside(key=queue, code=error.code, what=error.message[:MAX_ERROR_CHARS], item=item)
    while True:
        try:
            await process.store.run(script_call)
        except RedisRefused as refused:
            log.error("message.not_kept", queue=queue, error=refused.message, item=item_as_text(item))
            return
        except RedisUnreachable:
            await asyncio.sleep(REDIS_PAUSE_S)
        else:
            return


async def _store_failed_run(process: CeleryProcess, message: TaskMessage, error: OpenAgentsError) -> None:
    """Store a failed run for an invalid or refused request, so that its sender finds the reason."""
    script_call = reject(
        run_id=message.task_id,
        queue=message.queue or process.settings.queue,
        code=error.code,
        message=error.message,
        hint=error.hint or "",
    )
    try:
        known = not await process.store.run_until(script_call, lambda: not process.runner.accepting)
    except RedisRefused as refused:  # Redis has refused the request too
        log.error("message.not_answered", run_id=message.task_id, code=error.code, error=refused.message)
        return
    if not known:
        log.error("run.failed", run_id=message.task_id, code=error.code, message=error.message, attempts=0)
    else:
        log.warning("message.rejected", run_id=message.task_id, code=error.code, message=error.message)
