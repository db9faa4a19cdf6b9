"""Our tasks. The only place that gives Celery something to execute: names, settings, bodies."""

from __future__ import annotations

import asyncio
from typing import Any

from celery import Celery, Task
from celery.exceptions import Ignore

from openagents_worker.errors import OpenAgentsError, RedisUnreachable, RunConflict, RunFailed, SubmitUnknown
from openagents_worker.models import RunRequest
from openagents_worker.producer.submit import Accepted, asubmit
from openagents_worker.producer.task import AgentTask
from openagents_worker.producer.transport import RESUME_RUN, RUN_AGENT
from openagents_worker.runtime.attempt import Carried
from openagents_worker.store.scripts import reject
from openagents_worker.telemetry import get_logger
from openagents_worker.worker.intake import Message, run_to_resume, wanted
from openagents_worker.worker.outcome import tell_celery
from openagents_worker.worker.pool import ON_LOOP
from openagents_worker.worker.process import Host, WorkerProcess

__all__ = ["RECOVER_RUNS", "add_tasks"]

log = get_logger(__name__)

RECOVER_RUNS = "tasks.recover_runs"
REDIS_PAUSE_S = 0.5


def add_tasks(app: Celery, host: Host) -> None:
    """Register `tasks.run_agent`, `tasks.resume_run`, `tasks.recover_runs`; touch nothing else of the app."""
    settings: dict[str, Any] = {
        "bind": True,
        "shared": False,  # or Celery gives them to every other app of this process, too
        "acks_late": False,  # with late acknowledgement a connection blip starts a message a second time
        "ignore_result": host.settings.result_backend is None,
        "serializer": "json",
        "throws": (OpenAgentsError,),  # expected: one line in the log and no traceback
        "typing": False,  # a message with wrong arguments is answered, not refused by Celery
        "rate_limit": None,
        "track_started": False,
        ON_LOOP: True,
    }

    def run_agent(self: Task, *args: Any, **kwargs: Any) -> dict[str, str]:
        process, message = _process(host), _message_of(self, args, kwargs)
        try:
            run_id, carried = process.run(_carry(process, message))
        except OpenAgentsError as error:
            process.run(_answer(process, message, error))
            raise RunFailed(str(error), code=error.code, run_id=message.task_id) from None
        return tell_celery(self, run_id, carried)

    def resume_run(self: Task, *args: Any, **kwargs: Any) -> dict[str, str]:
        process, message = _process(host), _message_of(self, args, kwargs)
        run_id = run_to_resume(message)
        return tell_celery(self, run_id, process.run(process.runner.carry(run_id)))

    def recover_runs(self: Task) -> int:
        process = _process(host)
        return process.run(process.rescue.once())

    app.task(run_agent, name=RUN_AGENT, base=AgentTask, **settings)
    app.task(resume_run, name=RESUME_RUN, **settings)
    app.task(recover_runs, name=RECOVER_RUNS, **settings)


def _process(host: Host) -> WorkerProcess:
    process = host.process()
    if process is None:
        raise Ignore("this worker is stopping; the run is in Redis, and another one takes it")
    return process


def _message_of(task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Message:
    request = task.request
    headers = request.headers or {}
    queue = (request.delivery_info or {}).get("routing_key") or ""
    ours = "wake_us" in headers or getattr(request, "wake_us", None) is not None
    return Message(str(request.id), args, kwargs, queue.removesuffix(".wake"), ours)


async def _carry(process: WorkerProcess, message: Message) -> tuple[str, Carried]:
    """Carry the run that a message names, after accepting it where it comes from outside."""
    asked = wanted(message, max_bytes=process.settings.max_payload_bytes)
    if isinstance(asked, str):
        return asked, await process.runner.carry(asked)
    try:
        accepted = await _accepted(process, asked, message.queue)
    except RunConflict:
        log.warning("message.conflict", run_id=asked.run_id, hint="another request has this id")
        raise Ignore(f"the run {asked.run_id} belongs to another request") from None
    if accepted.also is not None:
        await process.send_wakes([accepted.also])
    return accepted.run_id, await process.runner.carry(accepted.run_id)


async def _accepted(process: WorkerProcess, request: RunRequest, queue: str) -> Accepted:
    """Accept a foreign request. Its message is gone from the broker, so this waits until Redis is there."""
    while True:
        try:
            return await asubmit(process.store, request, settings=process.settings, queue=queue or None)
        except (RedisUnreachable, SubmitUnknown) as error:
            log.warning("message.waits_for_redis", run_id=request.run_id, error=error.message)
            await asyncio.sleep(REDIS_PAUSE_S)


async def _answer(process: WorkerProcess, message: Message, error: OpenAgentsError) -> None:
    """A message that is no request becomes a failed run, so that whoever sent it finds out why."""
    door = reject(
        run_id=message.task_id,
        queue=message.queue or process.settings.queue,
        code=error.code,
        message=error.message,
        hint=error.hint or "",
    )
    known = not await process.store.run_until(door, lambda: not process.runner.accepting)
    log.warning("message.rejected", run_id=message.task_id, code=error.code, error=error.message, known=known)
