"""The process provider: the only place that selects the worker process in which a task body executes its run.

A worker has one process; under `task_always_eager` an eager process exists while a thread submits. An eager
process executes its wake-ups itself instead of sending messages: the next run of a session, or a retry that
has become due.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from celery import Celery, Task

from openagents_worker.errors import ConfigError, RequestInvalid
from openagents_worker.producer.publisher import RUN_AGENT, send_wakes
from openagents_worker.producer.task import not_called
from openagents_worker.settings import Settings
from openagents_worker.store.scripts import Wake

if TYPE_CHECKING:
    from openagents_worker.celery.process_holder import CeleryProcess, ProcessHolder

__all__ = ["ProcessProvider"]


MAP_TASKS = ("celery.map", "celery.starmap")
"""Celery's tasks that call another task once per item. Celery offers no hook to refuse them earlier."""


def _direct_call_error(task: Task) -> ConfigError | RequestInvalid:
    """The error for a run task whose body was called as a function."""
    outer = task.app.current_worker_task
    if outer is None or outer.name not in MAP_TASKS:
        return ConfigError(
            f"{task.name} cannot be called as a function: submit the run, and a worker executes it",
            hint="call run_agent.delay(request); in tests, set task_always_eager",
        )
    if RequestInvalid not in outer.throws:
        outer.throws = (*outer.throws, RequestInvalid)  # expected: one line in the log and no traceback
    return RequestInvalid(str(not_called(f"{outer.name} of {task.name}")))  # Celery sends only the text


class ProcessProvider:
    """Provides the worker processes that execute the runs of an app here; loaded at the first run."""

    def __init__(self, app: Celery, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._lock = threading.Lock()
        self._submitting = 0
        self._eager: ProcessHolder | None = None
        self._wake_threads: set[threading.Thread] = set()

    @cached_property
    def holder(self) -> ProcessHolder:
        """The holder of the worker's process."""
        return self._new_holder(partial(send_wakes, self._app))

    def process_for(self, task: Task, request: Any) -> CeleryProcess | None:
        """The process in which this task's body executes its run; None if it is stopping.

        `request` is Celery's request of the task. Raises `ConfigError` if the task was called as a function.
        """
        if request.called_directly:
            raise _direct_call_error(task)
        if not request.is_eager:
            return self.holder.process()
        return self._eager.process() if self._eager is not None else None

    @contextmanager
    def eager(self) -> Generator[None]:
        """A worker process inside this one until the last of the concurrent `with` blocks ends."""
        with self._lock:
            self._submitting += 1
            if self._eager is None:
                # The process belongs to the submitting program: a run must not end it.
                self._eager = self._new_holder(self._execute_in_threads, leave=lambda _: None)
            holder = self._eager
        try:
            holder.process()  # an invalid configuration is raised before a run is accepted
            yield
        finally:
            self._leave_eager()

    def _leave_eager(self) -> None:
        """Wait for the wake-ups, and close the eager process if this was the last user."""
        if threading.current_thread() not in self._wake_threads:
            while self._wake_threads:
                next(iter(self._wake_threads)).join()
        with self._lock:
            self._submitting -= 1
            holder, self._eager = (None, self._eager) if self._submitting else (self._eager, None)
        if holder is not None:
            holder.close()

    def _execute_in_threads(self, wakes: Sequence[Wake]) -> None:
        for wake in wakes:
            thread = threading.Thread(
                target=self._execute_wake, args=(wake,), name=f"eager run {wake.run_id}"
            )
            self._wake_threads.add(thread)
            thread.start()

    def _execute_wake(self, wake: Wake) -> None:
        try:
            self._app.tasks[RUN_AGENT].execute_wakes([wake])
        finally:
            self._wake_threads.discard(threading.current_thread())

    def _new_holder(
        self, send: Callable[[Sequence[Wake]], object], leave: Callable[[int], object] = os._exit
    ) -> ProcessHolder:
        from openagents_worker.celery.process_holder import ProcessHolder

        return ProcessHolder(self._settings, send, leave=leave)
