"""The bodies of our tasks. The only place that carries a run for a message and notes what Celery was told."""

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
from openagents_worker.producer.submit import asubmit
from openagents_worker.producer.task_options import canvas_of_message
from openagents_worker.queue_names import WAKE_SUFFIX
from openagents_worker.runtime.attempt import AttemptOutcome, AttemptResult
from openagents_worker.store.dead_letters import item_as_text
from openagents_worker.store.formats import WRITTEN
from openagents_worker.store.scripts import put_aside, reject
from openagents_worker.telemetry.logs import get_logger

__all__ = ["completion_notified", "prune", "recover_runs", "resume_run", "run_agent"]

log = get_logger(__name__)

REDIS_PAUSE_S = 0.5
MAX_WHY_CHARS = 500


def run_agent(
    task: Task, process: CeleryProcess | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Carry the run that a message names or asks for; what is no request becomes a failed run."""
    process, message = _there(process), _message_of(task, args, kwargs)
    max_bytes = process.settings.max_payload_bytes
    try:
        asked = parse_message(message, max_bytes=max_bytes)
        if isinstance(asked, RunRequest):
            canvas = canvas_of_message(
                task.request, max_bytes=max_bytes, key_prefix=process.settings.key_prefix
            )
            asked = process.run(_accepted(process, asked, message, canvas))
    except OpenAgentsError as error:
        process.run(_answer(process, message, error))
        raise RunFailed(str(error), code=error.code, run_id=message.task_id) from None
    return _tell(task, process, asked, process.execute(asked, message.format))


def resume_run(
    task: Task, process: CeleryProcess | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Carry a known run on."""
    process = _there(process)
    message = _message_of(task, args, kwargs)
    run_id = run_to_resume(message)
    return _tell(task, process, run_id, process.execute(run_id, message.format))


def recover_runs(process: CeleryProcess | None) -> int:
    """Bring back what can be brought back; says how many runs."""
    process = _there(process)
    return process.run(process.rescue.once())


def prune(process: CeleryProcess | None) -> int:
    """Take out of the lists of runs and sessions what has expired; says how many entries."""
    process = _there(process)
    return process.run(process.rescue.prune())


def _there(process: CeleryProcess | None) -> CeleryProcess:
    if process is None:
        raise Ignore("this worker is stopping; the run is in Redis, and another one takes it")
    return process


# --- telling Celery --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _CompletionNotice:
    """An end that Celery is being told of, and the state in which it then has the task."""

    process: CeleryProcess
    run_id: str
    life: int
    status: str


def _tell(task: Task, process: CeleryProcess, run_id: str, attempt_result: AttemptResult) -> dict[str, str]:
    # Only a message that is the run's own has its callbacks; for another one they are still to be called.
    if attempt_result.kind is AttemptOutcome.FINISHED and task.request.id == run_id:
        status = _STATUS.get(attempt_result.stop_reason or StopReason.FAILED, states.FAILURE)
        task.request.openagents_ending = _CompletionNotice(process, run_id, attempt_result.life, status)
    if (
        attempt_result.kind is AttemptOutcome.SUSPENDED
        and task.request.id == run_id
        and not task.request.is_eager
    ):
        process.put_aside(task, run_id)
    try:
        return report_to_celery(task, run_id, attempt_result)
    except Ignore:
        completion_notified(task, states.REVOKED)  # the tracer calls nobody after it
        raise


_STATUS = {StopReason.COMPLETED: states.SUCCESS, StopReason.CANCELLED: states.REVOKED}


def completion_notified(task: Task, status: str) -> None:
    """Celery has been told, and what is linked to the run has been sent: it is not told again.

    A worker that dies before leaves the run to be told by another; so may callbacks be called twice, and
    never not at all. With another status than the run's something went wrong on the way.
    """
    ending: _CompletionNotice | None = getattr(task.request, "openagents_ending", None)
    if ending is None or ending.status != status:
        return
    ending.process.completion_notified(ending.run_id, ending.life, wait=bool(task.request.is_eager))


# --- messages --------------------------------------------------------------------------------------------


def _message_of(task: Task, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TaskMessage:
    request = task.request
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
    """A message's time of expiry as milliseconds from now, at least one; 0 for none."""
    if not expires:
        return 0
    at = maybe_make_aware(iso_time(expires))
    return max(1, int((at - datetime.now(UTC)).total_seconds() * 1000))


async def _accepted(process: CeleryProcess, request: RunRequest, message: TaskMessage, canvas: str) -> str:
    """Accept a request from outside; the id of its run.

    Its message is gone from the broker, so this waits until Redis is there. A request that Redis refuses for
    good is put aside: it would hold a slot for ever. Raises `RedisRefused` then.
    """
    while True:
        try:
            accepted = await asubmit(
                process.store,
                request,
                settings=process.settings,
                queue=message.queue or None,
                expires_ms=message.expires_ms,
                canvas=canvas,
            )
        except RedisRefused as error:
            await _put_aside(process, request, message, error)
            raise
        except (RedisUnreachable, SubmitUnknown) as error:
            log.of_run(logging.WARNING, "message.waits_for_redis", run_id=request.run_id, error=error.message)
            await asyncio.sleep(REDIS_PAUSE_S)
        except RunConflict:
            log.warning("message.conflict", run_id=request.run_id, hint="another request has this id")
            raise Ignore(f"the run {request.run_id} belongs to another request") from None
        else:
            await process.send_wakes([accepted.also] if accepted.also is not None else [])
            return accepted.run_id


async def _put_aside(
    process: CeleryProcess, request: RunRequest, message: TaskMessage, error: RedisRefused
) -> None:
    """Keep a request that Redis refuses where `openagents-worker status` lists it: whole, so that it can be
    submitted again. Where Redis refuses that, too, the log has it."""
    item = request.model_dump_json(exclude_unset=True)
    queue = message.queue or process.settings.queue
    door = put_aside(key=queue, code=error.code, what=error.message[:MAX_WHY_CHARS], item=item)
    while True:
        try:
            await process.store.run(door)
        except RedisRefused as refused:
            log.error("message.not_kept", queue=queue, error=refused.message, item=item_as_text(item))
            return
        except RedisUnreachable:
            await asyncio.sleep(REDIS_PAUSE_S)
        else:
            return


async def _answer(process: CeleryProcess, message: TaskMessage, error: OpenAgentsError) -> None:
    """A message that is no request, or that Redis refuses, becomes a failed run: whoever sent it finds out
    why."""
    door = reject(
        run_id=message.task_id,
        queue=message.queue or process.settings.queue,
        code=error.code,
        message=error.message,
        hint=error.hint or "",
    )
    try:
        known = not await process.store.run_until(door, lambda: not process.runner.accepting)
    except RedisRefused as refused:  # as it has refused the request itself
        log.error("message.not_answered", run_id=message.task_id, code=error.code, error=refused.message)
        return
    if not known:
        log.error("run.failed", run_id=message.task_id, code=error.code, message=error.message, attempts=0)
    else:
        log.warning("message.rejected", run_id=message.task_id, code=error.code, message=error.message)
