"""Remote control: the only place where Celery's `revoke` becomes the cancellation of a run.

`AsyncResult.revoke`, `GroupResult.revoke`, `celery control revoke` and Flower's Terminate all send this
command to every worker. The id of a run is cancelled in its record, once for all workers, and is not added to
Celery's list of revoked ids. Any other id is passed to Celery's own command.
"""

from __future__ import annotations

import logging
from typing import Any

from celery.worker import control

from openagents_worker.errors import RedisUnreachable, RequestInvalid, RunNotFound
from openagents_worker.producer.app_binding import find_binding
from openagents_worker.producer.client import Client, client_of
from openagents_worker.queue_names import problem_with_read_queue
from openagents_worker.telemetry.logs import get_logger

__all__ = ["take_over_revoke"]

log = get_logger(__name__)

_celery_revoke = control.revoke
_celery_add_consumer = control.add_consumer


def take_over_revoke() -> None:
    """Replace `revoke`, `terminate` and `add_consumer` in workers whose app has our tasks."""
    control.Panel.data |= {"revoke": _revoke, "terminate": _terminate, "add_consumer": _add_consumer}


def _add_consumer(state: Any, queue: Any, *args: Any, **options: Any) -> Any:
    """Consume a queue, unless its name is a key of this library, of kombu or of Celery's results."""
    parts = find_binding(state.app)
    if parts is not None and parts.kind.has_tasks:
        problem = problem_with_read_queue(str(queue), parts.settings.key_prefix)
        if problem is not None:
            log.error("queue.refused", error=problem)
            return control.nok(problem)
    return _celery_add_consumer(state, queue, *args, **options)


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
