"""Blocking calls: the only place that moves blocking calls inside Celery off the loop: results and
publishing.

Celery's tracer and tasks are unchanged. The functions with which they store a result or send a message are
replaced by wrappers that call them in a thread. Outside a task body on the loop they are called directly.
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

BLOCKING_METHODS = frozenset(
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
    """Make these tasks store results and send messages in `threads` instead of on the loop."""
    if not getattr(app.send_task, "is_off_loop", False):
        app.send_task = in_thread(app.send_task, threads, _with_task_context)
        app.send_task.is_off_loop = True
    for task in tasks:
        task.send_event = in_thread(task.send_event, threads, _with_task_context)
        if not isinstance(task.backend, _ThreadedBackend | DisabledBackend):
            task.backend = _ThreadedBackend(task.backend, threads)


class _ThreadedBackend:
    """A result backend whose blocking methods are called in a thread."""

    def __init__(self, backend: Any, threads: Executor) -> None:
        self._backend = backend
        self._threads = threads

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return in_thread(found, self._threads, _with_task_context) if name in BLOCKING_METHODS else found


def _with_task_context() -> Callable[..., Any]:
    """Returns a function that calls another one, in any thread, with the context of the current task.

    Celery reads the parent of a message from its task stacks, which are local to a greenlet.
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
