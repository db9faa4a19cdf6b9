"""The queue of a submission. The only place that checks the queue that a caller has chosen for a run."""

from __future__ import annotations

from typing import Any

from openagents_worker.errors import RequestInvalid
from openagents_worker.queue_names import problem_with_queue

__all__ = ["HINT", "checked_queue"]

HINT = "choose another name, as in 'reports'; OPENAGENTS_QUEUE sets the default"


def checked_queue(name: Any, prefix: str, *, run_id: str | None = None) -> str:
    """The queue of a submission, '' if it has none. `prefix` is the key prefix of this library.

    Raises `RequestInvalid`.
    """
    if name is None or name == "":
        return ""
    if not isinstance(name, str):
        raise RequestInvalid(
            f"queue: it must be the name of a queue, not a {type(name).__name__}", hint=HINT, run_id=run_id
        )
    if problem := problem_with_queue(name, prefix):
        raise RequestInvalid(f"queue: {problem}", hint=HINT, run_id=run_id)
    return name
