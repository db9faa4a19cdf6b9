"""Blocking. The only place that keeps what blocks inside of Celery off the loop: results and publishing.

Celery's tracer and its tasks are used as they are; what they call to store a result or to send a message is
replaced by the same thing, done in a thread. Anywhere but in a task body on the loop it is called directly.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import copy_context
from typing import Any

from celery import Celery, Task
from celery._state import _task_stack
from celery.backends.base import DisabledBackend

from openagents_worker.worker.loop_thread import in_thread

__all__ = ["keep_off_loop"]

STORES = frozenset(
    [
        "mark_as_done",
        "mark_as_failure",
        "mark_as_retry",
        "mark_as_revoked",
        "mark_as_started",
        "on_chord_part_return",
        "store_result",
    ]
)


def keep_off_loop(app: Celery, tasks: list[Task], threads: Executor) -> None:
    """Let what these tasks of the app store and send block `threads` and not the loop."""
    if not getattr(app.send_task, "is_off_loop", False):
        app.send_task = in_thread(app.send_task, threads, _as_in_the_task)
        app.send_task.is_off_loop = True
    for task in tasks:
        task.send_event = in_thread(task.send_event, threads, _as_in_the_task)
        if not isinstance(task.backend, _Results | DisabledBackend):
            task.backend = _Results(task.backend, threads)


class _Results:
    """A result backend that stores in a thread."""

    def __init__(self, backend: Any, threads: Executor) -> None:
        self._backend = backend
        self._threads = threads

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return in_thread(found, self._threads, _as_in_the_task) if name in STORES else found


def _as_in_the_task() -> Callable[..., Any]:
    """Calls a function with the stacks and context variables of the task that runs here, in another thread.

    Celery takes from them whose child a message is.
    """
    task, context = _task_stack.top, copy_context()
    request = task.request_stack.top if task is not None else None

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if task is None:
            return context.run(function, *args, **kwargs)
        _task_stack.push(task)
        task.request_stack.push(request)
        try:
            return context.run(function, *args, **kwargs)
        finally:
            task.request_stack.pop()
            _task_stack.pop()

    return call
