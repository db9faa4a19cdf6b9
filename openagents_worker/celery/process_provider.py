"""The crew. The only place that says which worker process a task's body finds: the worker's, or an eager one.

An eager process lives for as long as somebody submits under `task_always_eager`. What it would send as a
message it carries itself: the next run of a session, a retry that has become due meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING

from celery import Celery, Task

from openagents_worker.errors import ConfigError, RequestInvalid
from openagents_worker.producer.publisher import RUN_AGENT, send_wakes
from openagents_worker.producer.task import not_called
from openagents_worker.settings import Settings
from openagents_worker.store.scripts import Wake

if TYPE_CHECKING:
    from openagents_worker.celery.process_holder import CeleryProcess, ProcessHolder

__all__ = ["ProcessProvider"]


CELERYS_MAPS = ("celery.map", "celery.starmap")
"""Celery's tasks that call another task, once for each item. Celery has no place to refuse them earlier."""


def _called_directly(task: Task) -> ConfigError | RequestInvalid:
    outer = task.app.current_worker_task
    if outer is None or outer.name not in CELERYS_MAPS:
        return ConfigError(
            f"{task.name} is no function to call: a run is submitted, and carried by a worker",
            hint="run_agent.delay(request); in tests also under task_always_eager",
        )
    if RequestInvalid not in outer.throws:
        outer.throws = (*outer.throws, RequestInvalid)  # expected: one line in the log and no traceback
    return RequestInvalid(str(not_called(f"{outer.name} of {task.name}")))  # Celery sends the text alone


class ProcessProvider:
    """What carries the runs of an app in this process; nothing of it is loaded before the first run."""

    def __init__(self, app: Celery, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._lock = threading.Lock()
        self._submitting = 0
        self._eager: ProcessHolder | None = None
        self._others: set[threading.Thread] = set()

    @cached_property
    def host(self) -> ProcessHolder:
        """The worker's."""
        return self._new_host(partial(send_wakes, self._app))

    def at_work(self, task: Task) -> CeleryProcess | None:
        """The process in which the body of this task finds its run; None once it is stopping."""
        if task.request.called_directly:
            raise _called_directly(task)
        if not task.request.is_eager:
            return self.host.process()
        return self._eager.process() if self._eager is not None else None

    @contextmanager
    def eager(self) -> Generator[None]:
        """A worker process in this one for as long as the block lasts, and longer if others are in theirs."""
        with self._lock:
            self._submitting += 1
            if self._eager is None:
                # Whose process it is decides about its end, not a run in it.
                self._eager = self._new_host(self._execute_others, leave=lambda _: None)
            host = self._eager
        try:
            host.process()  # what is wrong with its configuration is said before anything is accepted
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        if threading.current_thread() not in self._others:
            while self._others:
                next(iter(self._others)).join()
        with self._lock:
            self._submitting -= 1
            host, self._eager = (None, self._eager) if self._submitting else (self._eager, None)
        if host is not None:
            host.close()

    def _execute_others(self, wakes: Sequence[Wake]) -> None:
        for wake in wakes:
            other = threading.Thread(
                target=self._execute_other, args=(wake,), name=f"eager run {wake.run_id}"
            )
            self._others.add(other)
            other.start()

    def _execute_other(self, wake: Wake) -> None:
        try:
            self._app.tasks[RUN_AGENT].execute_wakes([wake])
        finally:
            self._others.discard(threading.current_thread())

    def _new_host(
        self, send: Callable[[Sequence[Wake]], object], leave: Callable[[int], object] = os._exit
    ) -> ProcessHolder:
        from openagents_worker.celery.process_holder import ProcessHolder

        return ProcessHolder(self._settings, send, leave=leave)
