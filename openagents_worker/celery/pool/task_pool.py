"""The task pool: the only place that makes Celery execute a thousand tasks on one event loop.

`app.conf.worker_pool` names it, so that a plain `celery -A … worker` uses it. Each task runs through Celery's
own tracer, in a greenlet on the loop's thread: signals, `self.request`, acknowledgements, retries, events and
results are the same as in other pools. An `async def` task is awaited there. Any other task of the app would
block the loop: it runs in a thread, as in Celery's `threads` pool, and cannot be interrupted.

In a registered app, runs have a separate limit (`OPENAGENTS_CONCURRENCY`). Runs mostly wait, and the app's
`worker_concurrency` was chosen for tasks that use processor time.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import threading
from collections import deque
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from celery import Celery, Task, signals
from celery.concurrency.base import BasePool
from celery.worker import state

from openagents_worker.celery.pool.blocking import keep_off_loop
from openagents_worker.celery.pool.pool_task import PoolRequest, PoolTask
from openagents_worker.producer.app_binding import AppKind, find_binding
from openagents_worker.producer.message_names import RUN_ENDED
from openagents_worker.tools.offload import DaemonThreads
from openagents_worker.worker.loop_thread import LoopThread, drive

__all__ = ["ON_LOOP", "TaskPool", "do_nothing", "run_limit_of"]

ON_LOOP = "waits_on_loop"
"""The attribute of a task that is synchronous but waits through `LoopThread.run`: it runs on the loop."""

MAX_BLOCKING = 16  # threads that store results and publish messages; more do not make the servers faster


class _TaskGroup:
    """Tasks that share one limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting: deque[PoolTask] = deque()  # wait because `limit` tasks run
        self.running = 0
        self.unfinished: set[int] = set()
        """The numbers of the tasks that wait or run, as the consumer's thread counts them."""

    def stats(self) -> dict[str, int]:
        return {"limit": self.limit, "running": self.running, "waiting": len(self.waiting)}


class TaskPool(BasePool):  # type: ignore[misc]  # Celery ships no types
    """Executes at most `limit` tasks at a time on the loop of `loop_thread`.

    In a registered app `limit` applies to the app's own tasks; runs have a separate limit.
    """

    limit: int
    body_can_be_buffer = True
    signal_safe = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loop_thread = LoopThread()
        self.loop_thread.is_busy = lambda: self._running() > 0
        self._numbers = itertools.count(1)
        self._pool_tasks: dict[int, PoolTask] = {}
        self._unfinished_completions: set[int] = set()
        self.on_task_end: Callable[[], None] = do_nothing
        """Called on Celery's hub in the main thread when a task has ended and has freed a slot."""
        self._task_group = _TaskGroup(self.limit)
        run_limit = run_limit_of(self.app)
        self._run_group = self._task_group if run_limit is None else _TaskGroup(run_limit)
        self._groups = (self._task_group,) if run_limit is None else (self._task_group, self._run_group)
        self._changed = threading.Condition()
        self._hub: Any = None
        self._threads = DaemonThreads(self.limit, name="openagents-task")
        self._blocking = DaemonThreads(MAX_BLOCKING, name="openagents-blocking")

    # --- Celery's side, in the main thread ---------------------------------------------------------------

    def on_start(self) -> None:
        self.loop_thread.start()
        self._loop_task_names = {task.name for task in self.app.tasks.values() if _runs_on_loop(task)}
        self._run_task_names = {
            task.name for task in self.app.tasks.values() if getattr(task, ON_LOOP, False)
        }
        tasks = [self.app.tasks[name] for name in self._loop_task_names]
        for task in tasks:
            if task.name not in self._run_task_names:
                _make_body_awaited(task, self.loop_thread)
        keep_off_loop(self.app, tasks, self._blocking)
        signals.worker_process_init.send(sender=self)  # as in a solo pool: this process executes the tasks

    def register_with_event_loop(self, hub: Any) -> None:
        self._hub = hub

    def on_apply(
        self, target: Callable[..., Any], args: Any = None, kwargs: Any = None, **options: Any
    ) -> PoolTask:
        """Called by Celery's consumer for each received message."""
        name, _, message, *_ = args
        task = self.app.tasks[name]
        # Read from the task now: Celery's request holds the limits from before a remote control command.
        hard, soft = message.get("timelimit") or (None, None)
        request = PoolRequest(
            target,
            tuple(args),
            kwargs or {},
            name,
            on_loop=name in self._loop_task_names,
            timeout=hard or task.time_limit,
            soft_timeout=soft or task.soft_time_limit,
            **{name: options.get(name) for name in _CALLBACKS},
        )
        pool_task = PoolTask(next(self._numbers), request, loop=self.loop_thread.loop)
        self._pool_tasks[pool_task.number] = pool_task
        group = self._run_group if name in self._run_task_names else self._task_group
        group.unfinished.add(pool_task.number)
        if message.get(RUN_ENDED):
            self._unfinished_completions.add(pool_task.number)
        group.waiting.append(pool_task)
        self.loop_thread.loop.call_soon_threadsafe(self._start_waiting, group)
        return pool_task

    @property
    def has_run_limit(self) -> bool:
        """Whether runs have a separate limit beside `limit`."""
        return self._run_group is not self._task_group

    @property
    def run_limit(self) -> int:
        """The number of runs that may be executed at a time."""
        return self._run_group.limit

    def unfinished_runs(self) -> int:
        """The number of runs that were received and are not done. Thread-safe."""
        return len(self._run_group.unfinished)

    def unfinished_completions(self) -> int:
        """The number of received tasks, not done yet, that only notify Celery of the end of a run."""
        return len(self._unfinished_completions)

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        pool_task = self._pool_tasks.get(pid)
        if pool_task is not None:
            pool_task.terminate(signal)

    def grow(self, n: int = 1) -> None:
        self._resize(self.limit + n)

    def shrink(self, n: int = 1) -> None:
        """Start fewer tasks from now on; tasks that run are not interrupted."""
        self._resize(max(1, self.limit - n))

    def _resize(self, limit: int) -> None:
        self.limit = self._threads.limit = self._task_group.limit = limit
        self.loop_thread.loop.call_soon_threadsafe(self._start_waiting, self._task_group)

    def on_stop(self) -> None:
        """Wait for the tasks that were not stopped. Tasks that have not started go back to the broker."""
        with self._changed:
            for group in self._groups:
                for pool_task in group.waiting:
                    self._pool_tasks.pop(pool_task.number)
                    group.unfinished.discard(pool_task.number)
                    self._unfinished_completions.discard(pool_task.number)
                group.waiting.clear()
            self._changed.wait_for(self._all_running_are_stopped)
        if not state.should_terminate:  # if it is set, bootsteps that stop later still need the loop
            self._close()

    def on_terminate(self) -> None:
        for pool_task in list(self._pool_tasks.values()):
            pool_task.terminate()
        self._close()

    def _all_running_are_stopped(self) -> bool:
        return all(pool_task.stopped for pool_task in list(self._pool_tasks.values()))

    def _close(self) -> None:
        self.loop_thread.stop()
        self._threads.shutdown()
        self._blocking.shutdown()

    def _get_info(self) -> dict[str, Any]:
        return {
            **super()._get_info(),
            "running": self._running(),
            "waiting": sum(len(group.waiting) for group in self._groups),
            **({"runs": self._run_group.stats()} if self.has_run_limit else {}),
            "loop": type(self.loop_thread.loop).__module__.partition(".")[0],
            "threads": self._threads.stats(),
            "blocking": self._blocking.stats(),
        }

    def _call_on_task_end(self) -> None:
        self.on_task_end()

    # --- on the loop -------------------------------------------------------------------------------------

    def _running(self) -> int:
        """The number of running tasks of all groups."""
        return sum(group.running for group in self._groups)

    def _start_waiting(self, group: _TaskGroup) -> None:
        """Start waiting tasks up to the limit of the group."""
        loop = self.loop_thread.loop
        with self._changed:
            while group.waiting and group.running < group.limit:
                pool_task = group.waiting.popleft()
                group.running += 1
                if self._running() == 1:
                    self.loop_thread.work_began.set()
                body = pool_task.begin()
                execution: asyncio.Future[Any] = (
                    loop.create_task(drive(body), name=f"task {pool_task.request.name}")
                    if body is not None
                    else loop.run_in_executor(self._threads, pool_task.execute)
                )
                execution.add_done_callback(partial(self._on_done, pool_task, group))

    def _on_done(self, pool_task: PoolTask, group: _TaskGroup, _: asyncio.Future[Any]) -> None:
        """Free the slot of a task that has ended, and start the next one."""
        if (callback := pool_task.unfinished_callback()) is not None:
            callback.add_done_callback(partial(self._on_done, pool_task, group))
            return
        pool_task.close()
        group.running -= 1
        group.unfinished.discard(pool_task.number)
        self._unfinished_completions.discard(pool_task.number)
        del self._pool_tasks[pool_task.number]
        if group.waiting:
            self._start_waiting(group)
        with self._changed:
            self._changed.notify_all()
        # Always wake the hub, which may have stopped fetching messages: it counts received messages, the
        # pool counts started tasks, so the pool does not know whether the hub has stopped.
        if self._hub is not None:
            self._hub.call_soon(self._call_on_task_end)


def run_limit_of(app: Celery) -> int | None:
    """The limit of runs; None if runs share the limit of all tasks, as in our own app."""
    parts = find_binding(app)
    return parts.settings.concurrency if parts is not None and parts.kind is AppKind.REGISTERED else None


_CALLBACKS = ("callback", "accept_callback", "error_callback", "timeout_callback")


def do_nothing() -> None:
    """The `on_task_end` of a pool if no message waits for a free slot."""


def _runs_on_loop(task: Task) -> bool:
    """Whether the body is async, or sync with the `ON_LOOP` attribute."""
    return bool(getattr(task, ON_LOOP, False)) or inspect.iscoroutinefunction(inspect.unwrap(task.run))


def _make_body_awaited(task: Task, loop_thread: LoopThread) -> None:
    """Make the body of an `async def` task awaited when Celery's tracer calls it."""
    name = "_orig_run" if hasattr(task, "_orig_run") else "run"  # `autoretry_for` wraps the body
    body = getattr(task, name)

    @wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = body(*args, **kwargs)
        return loop_thread.run(result) if inspect.iscoroutine(result) else result

    setattr(task, name, run)
