"""Remote control: the only place that changes what Celery's remote commands do in a worker with runs.

`AsyncResult.revoke`, `GroupResult.revoke`, `celery control revoke` and Flower's Terminate all send this
command to every worker. The id of a run is cancelled in its record, once for all workers, and is not added to
Celery's list of revoked ids. Any other id is passed to Celery's own command.

`add_consumer` (also a button of Flower) adds queues of the app's own tasks. A queue of runs needs more than a
consumer: the queue of its wake-ups, the rescue loop and the announcement of the worker.
"""

from __future__ import annotations

import logging
from typing import Any

from celery.worker import control

from openagents_worker.celery.process_holder import ProcessHolder
from openagents_worker.errors import RedisUnreachable, RequestInvalid, RunNotFound
from openagents_worker.producer.app_binding import find_binding
from openagents_worker.producer.client import Client, client_of
from openagents_worker.queue_names import WAKE_SUFFIX, problem_with_read_queue
from openagents_worker.telemetry.logs import get_logger

__all__ = ["take_over_revoke"]

log = get_logger(__name__)

_celery_revoke = control.revoke
_celery_add_consumer = control.add_consumer


def take_over_revoke() -> None:
    """Replace `revoke`, `terminate` and `add_consumer` in workers whose app has our tasks."""
    control.Panel.data |= {"revoke": _revoke, "terminate": _terminate, "add_consumer": _add_consumer}


def _add_consumer(state: Any, queue: Any, *args: Any, **options: Any) -> Any:
    """Consume a queue. A name that is not valid is refused, and so is a further queue of runs."""
    parts = find_binding(state.app)
    if parts is not None and parts.processes is not None:
        problem = problem_with_read_queue(str(queue), parts.settings.key_prefix)
        problem = problem or _problem_with_runs(str(queue), parts.processes.holder)
        if problem is not None:
            log.error("queue.refused", error=problem)
            return control.nok(problem)
    return _celery_add_consumer(state, queue, *args, **options)


def _problem_with_runs(queue: str, holder: ProcessHolder) -> str | None:
    """Why this worker cannot begin to consume the queue while it runs. None: it contains no runs."""
    name = queue.removesuffix(WAKE_SUFFIX)
    if name in holder.queues or (holder.run_queues is not None and name not in holder.run_queues):
        return None
    return (
        f"the queue {name} contains runs: a worker also reads their wake-ups and announces the queue, which "
        f"it does only from its start; add {name} to -Q and restart the worker"
    )


def _revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **options: Any) -> Any:
    """Cancel the ids that are runs; Celery revokes the others."""
    ids = sorted(control.maybe_list(task_id) or [])
    parts = find_binding(state.app)
    if parts is None or not parts.kind.has_tasks:
        return _celery_revoke(state, ids, terminate, signal, **options)
    try:
        cancelled = _cancel_runs(client_of(state.app), ids)
    except RedisUnreachable as error:
        log.warning("revoke.redis_away", ids=ids, error=error.message)
        return control.nok(f"no task was revoked: {error.message}")
    others = [each for each in ids if each not in cancelled]
    if others:
        return _celery_revoke(state, others, terminate, signal, **options)
    return control.ok(f"cancelled {', '.join(cancelled)}")


def _terminate(state: Any, signal: Any, task_id: Any, **options: Any) -> Any:
    return _revoke(state, task_id, terminate=True, signal=signal, **options)


def _cancel_runs(client: Client, ids: list[str]) -> list[str]:
    """Cancel each id that is a run; returns the ids of the runs."""
    found = []
    for run_id in ids:
        try:
            answer = client.cancel(run_id, "revoked")
        except (RunNotFound, RequestInvalid):  # an id that is not a valid run id
            continue
        found.append(run_id)
        log.of_run(logging.INFO, "run.revoked", run_id=run_id, answer=answer.value)
    return found
