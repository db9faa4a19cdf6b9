"""Queue checks. The only place that compares the queues of a submission, of what is linked to it, and of
stored runs with the names that a queue may have (`queue_names`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from openagents_worker.errors import RequestInvalid
from openagents_worker.queue_names import problem_with_queue
from openagents_worker.settings import Settings
from openagents_worker.telemetry.logs import get_logger

__all__ = ["check_linked_queues", "checked_queue", "queue_to_send_to"]

log = get_logger(__name__)

HINT = "choose another name, as in 'reports'; OPENAGENTS_QUEUE names the default"
_NAMES_A_QUEUE = ("queue", "routing_key", "reply_to")
_LINKED = ("chain", "chord", "link", "link_error")


def checked_queue(name: Any, prefix: str, *, run_id: str | None = None) -> str:
    """The queue that a submission names, '' for none. Raises `RequestInvalid`."""
    if name is None or name == "":
        return ""
    if not isinstance(name, str):
        raise RequestInvalid(
            f"queue: a queue is given by its name, not as a {type(name).__name__}", hint=HINT, run_id=run_id
        )
    if problem := problem_with_queue(name, prefix):
        raise RequestInvalid(f"queue: {problem}", hint=HINT, run_id=run_id)
    return name


def check_linked_queues(canvas: Mapping[str, Any], prefix: str) -> None:
    """Raises `RequestInvalid` for a task linked to a run whose queue has a name that no queue may have.

    Celery sends such a task where its signature says once the run has ended: that is a key on a Redis broker.
    """
    for where, name in _named_queues({key: canvas[key] for key in (*_LINKED, "reply_to") if key in canvas}):
        if isinstance(name, str) and name and (problem := problem_with_queue(name, prefix)):
            raise RequestInvalid(f"{where}: {problem}", hint=HINT)


def _named_queues(value: Any) -> Iterator[tuple[str, Any]]:
    """Every queue's name in signatures, with where it stands; without recursion, as they may be nested."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        where, found = waiting.pop()
        if isinstance(found, Mapping):
            for key, each in found.items():
                path = f"{where}.{key}" if where else str(key)
                if key in _NAMES_A_QUEUE and (where.endswith("options") or not where):
                    yield path, each
                else:  # signatures also stand in the arguments of groups and chains
                    waiting.append((path, each))
        elif isinstance(found, list | tuple):
            waiting += [(f"{where}[{at}]", each) for at, each in enumerate(found)]


def queue_to_send_to(name: str, settings: Settings, run_id: str) -> str:
    """The queue for a message of a stored run: the default where the record names one that no queue may have.

    An earlier version accepted any name. To send there would make a list of a key of this library.
    """
    problem = problem_with_queue(name, settings.key_prefix)
    if problem is None:
        return name
    log.warning("run.queue_replaced", run_id=run_id, queue=settings.queue, error=problem)
    return settings.queue
