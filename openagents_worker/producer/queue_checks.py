"""Queue checks. The only place that applies the rules of `queue_names` to linked tasks and to stored runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from openagents_worker.errors import RequestInvalid
from openagents_worker.queue_names import problem_with_queue
from openagents_worker.settings import Settings
from openagents_worker.submission.queue_choice import HINT
from openagents_worker.telemetry.logs import get_logger

__all__ = ["check_linked_queues", "queue_to_send_to"]

log = get_logger(__name__)

_QUEUE_OPTIONS = ("queue", "routing_key", "reply_to")
_LINKED = ("chain", "chord", "link", "link_error")


def check_linked_queues(canvas: Mapping[str, Any], prefix: str) -> None:
    """Raises `RequestInvalid` for a task linked to a run, if the name of its queue is not valid.

    Celery sends such a task to that queue when the run has ended. On a Redis broker the queue is a key.
    """
    linked = {key: canvas[key] for key in (*_LINKED, "reply_to") if key in canvas}
    for path, name in _queue_options(linked):
        if isinstance(name, str) and name and (problem := problem_with_queue(name, prefix)):
            raise RequestInvalid(f"{path}: {problem}", hint=HINT)


def _queue_options(signatures: Any) -> Iterator[tuple[str, Any]]:
    """The path and the value of every queue option in signatures. There is no recursion: they may be
    nested."""
    waiting: list[tuple[str, Any]] = [("", signatures)]
    while waiting:
        path, part = waiting.pop()
        if isinstance(part, Mapping):
            for key, value in part.items():
                inner_path = f"{path}.{key}" if path else str(key)
                if key in _QUEUE_OPTIONS and (path.endswith("options") or not path):
                    yield inner_path, value
                else:  # the arguments of groups and chains contain signatures, too
                    waiting.append((inner_path, value))
        elif isinstance(part, list | tuple):
            waiting += [(f"{path}[{index}]", item) for index, item in enumerate(part)]


def queue_to_send_to(name: str, settings: Settings, run_id: str) -> str:
    """The queue for a message of a stored run; the default queue if the stored name is not valid.

    An earlier version accepted any name. A message to such a queue could overwrite a key of this library.
    """
    problem = problem_with_queue(name, settings.key_prefix)
    if problem is None:
        return name
    log.warning("run.queue_replaced", run_id=run_id, queue=settings.queue, error=problem)
    return settings.queue
