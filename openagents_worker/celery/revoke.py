"""Remote control. The only place where Celery's `revoke` becomes a run's cancellation.

`AsyncResult.revoke`, `GroupResult.revoke`, `celery control revoke` and Flower's Terminate all send this
command to every worker. An id that is a run's is cancelled in its record, once for all workers, and never
enters the memory of revoked ids; any other id goes to Celery's own command.
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

_celerys_revoke = control.revoke
_celerys_add_consumer = control.add_consumer


def take_over_revoke() -> None:
    """Let workers whose app has our tasks answer `revoke`, `terminate` and `add_consumer`; others answer as
    before."""
    control.Panel.data |= {"revoke": _revoke, "terminate": _terminate, "add_consumer": _add_consumer}


def _add_consumer(state: Any, queue: Any, *args: Any, **more: Any) -> Any:
    """Read a queue from now on, unless it would be a key of this library, of kombu or of Celery's results."""
    parts = find_binding(state.app)
    if parts is not None and parts.kind.has_tasks:
        problem = problem_with_read_queue(str(queue), parts.settings.key_prefix)
        if problem is not None:
            log.error("queue.refused", error=problem)
            return control.nok(problem)
    return _celerys_add_consumer(state, queue, *args, **more)


def _revoke(state: Any, task_id: Any, terminate: bool = False, signal: Any = None, **more: Any) -> Any:
    """Cancel what is a run, and let Celery revoke the rest."""
    ids = sorted(control.maybe_list(task_id) or [])
    parts = find_binding(state.app)
    if parts is None or not parts.kind.has_tasks:
        return _celerys_revoke(state, ids, terminate, signal, **more)
    try:
        cancelled = _cancelled(client_of(state.app), ids)
    except RedisUnreachable as error:
        log.warning("revoke.redis_away", ids=ids, error=error.message)
        return control.nok(f"nothing is revoked: {error.message}")
    others = [each for each in ids if each not in cancelled]
    if others:
        return _celerys_revoke(state, others, terminate, signal, **more)
    return control.ok(f"cancelled {', '.join(cancelled)}")


def _terminate(state: Any, signal: Any, task_id: Any, **more: Any) -> Any:
    return _revoke(state, task_id, terminate=True, signal=signal, **more)


def _cancelled(client: Client, ids: list[str]) -> list[str]:
    """Those of the ids that are runs, each of them cancelled."""
    found = []
    for run_id in ids:
        try:
            answer = client.cancel(run_id, "revoked")
        except (RunNotFound, RequestInvalid):  # also what can be the id of no run
            continue
        found.append(run_id)
        log.of_run(logging.INFO, "run.revoked", run_id=run_id, answer=answer.value)
    return found
