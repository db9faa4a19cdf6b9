"""The pool. The only place that tells Celery how to run a thousand tasks on one event loop.

Named by `app.conf.worker_pool`, so that a plain `celery -A … worker` gets it. Each task runs through Celery's
own tracer, in a greenlet on the loop's thread: signals, `self.request`, acknowledgements, retries, events
and results are those of every other pool. An `async def` task is awaited there. Any other task of somebody's
app would block the loop: it runs in a thread, as in Celery's `threads` pool, and cannot be interrupted.

In an app of somebody's own, runs have a limit of their own (`OPENAGENTS_CONCURRENCY`): they wait, mostly, and
the app's `worker_concurrency` was chosen for tasks that compute.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from celery import Celery, Task, signals
from celery.concurrency.base import BasePool
from celery.worker import state

from openagents_worker.celery.pool.blocking import keep_off_loop
from openagents_worker.celery.pool.pool_task import PoolRequest, PoolTask
from openagents_worker.producer.app_binding import AppKind, find_binding
from openagents_worker.producer.kombu_redis import RUN_ENDED
from openagents_worker.tools.offload import DaemonThreads
from openagents_worker.worker.loop_thread import LoopThread

__all__ = ["ON_LOOP", "TaskPool", "no_more"]

ON_LOOP = "waits_on_loop"
"""A task with this attribute set is synchronous, but waits by `LoopThread.run` and so belongs on the loop."""

MAX_BLOCKING = 16  # threads for results and messages: their servers are not faster with more


class _TaskGroup:
    """Tasks that share one limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.waiting: deque[PoolTask] = deque()  # the lane is full; or due by its ETA while it is
        self.running = 0
        self.in_hand: set[int] = set()
        """The numbers of the jobs that wait or run, as the consumer's thread counts them."""

    def stats(self) -> dict[str, int]:
        return {"limit": self.limit, "running": self.running, "waiting": len(self.waiting)}


class TaskPool(BasePool):  # type: ignore[misc]  # Celery ships no types
    """Runs at most `limit` tasks at a time; `bridge` is the loop on which they do.

    In a registered app that is the limit of the app's own tasks; runs have another one beside it.
    """

    limit: int
    body_can_be_buffer = True
    signal_safe = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bridge = LoopThread()
        self.bridge.is_busy = lambda: self._running() > 0
        self._numbers = itertools.count(1)
        self._jobs: dict[int, PoolTask] = {}
        self._ends: set[int] = set()
        self.after_job: Callable[[], None] = no_more
        """Called on the hub, in the main thread, when a task has ended: there is room again."""
        self._tasks = _TaskGroup(self.limit)
        run_limit = _run_limit(self.app)
        self._runs = self._tasks if run_limit is None else _TaskGroup(run_limit)
        self._lanes = (self._tasks,) if run_limit is None else (self._tasks, self._runs)
        self._changed = threading.Condition()
        self._hub: Any = None
        self._threads = DaemonThreads(self.limit, name="openagents-task")
        self._blocking = DaemonThreads(MAX_BLOCKING, name="openagents-blocking")

    # --- Celery's side, in the main thread ---------------------------------------------------------------

    def on_start(self) -> None:
        self.bridge.start()
        self._on_loop = {task.name for task in self.app.tasks.values() if _is_for_loop(task)}
        self._of_runs = {task.name for task in self.app.tasks.values() if getattr(task, ON_LOOP, False)}
        tasks = [self.app.tasks[name] for name in self._on_loop]
        for task in tasks:
            _await_body(task, self.bridge)
        keep_off_loop(self.app, tasks, self._blocking)
        signals.worker_process_init.send(sender=self)  # as in solo: this process is the one that works

    def register_with_event_loop(self, hub: Any) -> None:
        self._hub = hub

    def on_apply(
        self, target: Callable[..., Any], args: Any = None, kwargs: Any = None, **options: Any
    ) -> PoolTask:
        name, _, message, *_ = args
        task = self.app.tasks[name]
        # Asked of the task now: Celery's request has kept what it was before the remote control changed it.
        hard, soft = message.get("timelimit") or (None, None)
        order = PoolRequest(
            target,
            tuple(args),
            kwargs or {},
            name,
            on_loop=name in self._on_loop,
            timeout=hard or task.time_limit,
            soft_timeout=soft or task.soft_time_limit,
            **{told: options.get(told) for told in _TOLD},
        )
        job = PoolTask(next(self._numbers), order, loop=self.bridge.loop)
        self._jobs[job.number] = job
        lane = self._runs if name in self._of_runs else self._tasks
        lane.in_hand.add(job.number)
        if message.get(RUN_ENDED):
            self._ends.add(job.number)
        self.bridge.loop.call_soon_threadsafe(self._admit, job, lane)
        return job

    @property
    def has_run_limit(self) -> bool:
        """Whether runs have a limit of their own beside `limit`."""
        return self._runs is not self._tasks

    @property
    def run_limit(self) -> int:
        """How many runs it carries at a time."""
        return self._runs.limit

    def runs_in_hand(self) -> int:
        """How many runs have been taken from the broker and are not done; from any thread."""
        return len(self._runs.in_hand)

    def ends_in_hand(self) -> int:
        """How many of the tasks that were taken and are not done only notify Celery of a run's end."""
        return len(self._ends)

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        job = self._jobs.get(pid)
        if job is not None:
            job.terminate(signal)

    def grow(self, n: int = 1) -> None:
        self._resize(self.limit + n)

    def shrink(self, n: int = 1) -> None:
        """Take on fewer tasks from now on; those that run end by themselves."""
        self._resize(max(1, self.limit - n))

    def _resize(self, limit: int) -> None:
        self.limit = self._threads.limit = self._tasks.limit = limit
        self.bridge.loop.call_soon_threadsafe(self._go_on, self._tasks)

    def on_stop(self) -> None:
        """Wait for the tasks that were not told to stop; those that have not begun go back to the broker."""
        with self._changed:
            for lane in self._lanes:
                for job in lane.waiting:
                    self._jobs.pop(job.number)
                    lane.in_hand.discard(job.number)
                    self._ends.discard(job.number)
                lane.waiting.clear()
            self._changed.wait_for(self._only_stopped_ones_run)
        if not state.should_terminate:  # then the steps that stop after this one still need the loop
            self._close()

    def on_terminate(self) -> None:
        for job in list(self._jobs.values()):
            job.terminate()
        self._close()

    def _only_stopped_ones_run(self) -> bool:
        return all(job.stopped for job in list(self._jobs.values()))

    def _close(self) -> None:
        self.bridge.stop()
        self._threads.shutdown()
        self._blocking.shutdown()

    def _get_info(self) -> dict[str, Any]:
        return {
            **super()._get_info(),
            "running": self._running(),
            "waiting": sum(len(lane.waiting) for lane in self._lanes),
            **({"runs": self._runs.stats()} if self.has_run_limit else {}),
            "loop": type(self.bridge.loop).__module__.partition(".")[0],
            "threads": self._threads.stats(),
            "blocking": self._blocking.stats(),
        }

    def _tell_of_room(self) -> None:
        self.after_job()

    # --- on the loop -------------------------------------------------------------------------------------

    def _running(self) -> int:
        return sum(lane.running for lane in self._lanes)

    def _admit(self, job: PoolTask, lane: _TaskGroup) -> None:
        lane.waiting.append(job)
        self._go_on(lane)

    def _go_on(self, lane: _TaskGroup) -> None:
        with self._changed:
            while lane.waiting and lane.running < lane.limit:
                job = lane.waiting.popleft()
                lane.running += 1
                if self._running() == 1:
                    self.bridge.began.set()
                self.bridge.loop.create_task(self._execute(job, lane), name=f"task {job.order.name}")

    async def _execute(self, job: PoolTask, lane: _TaskGroup) -> None:
        try:
            await job.execute(self._threads)
        finally:
            lane.running -= 1
            lane.in_hand.discard(job.number)
            self._ends.discard(job.number)
            del self._jobs[job.number]
            self._go_on(lane)
            with self._changed:
                self._changed.notify_all()
            # Nothing else tells the hub, which may have stopped taking messages, that there is room again.
            # Whether it has is not for us to say: it counts what it has taken, we what we have begun.
            if self._hub is not None:
                self._hub.call_soon(self._tell_of_room)


def _run_limit(app: Celery) -> int | None:
    """How many runs at a time; None where they share the limit of all tasks, as in an app of ours."""
    parts = find_binding(app)
    return parts.settings.concurrency if parts is not None and parts.kind is AppKind.REGISTERED else None


_TOLD = ("callback", "accept_callback", "error_callback", "timeout_callback")


def no_more() -> None:
    """What the hub is woken with where nobody waits for room."""


def _is_for_loop(task: Task) -> bool:
    return bool(getattr(task, ON_LOOP, False)) or inspect.iscoroutinefunction(inspect.unwrap(task.run))


def _await_body(task: Task, bridge: LoopThread) -> None:
    """Let the tracer, which only calls a task's body, get what an `async def` body returns once awaited."""
    name = "_orig_run" if hasattr(task, "_orig_run") else "run"  # `autoretry_for` stands before the body
    body = getattr(task, name)

    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        result = body(*args, **kwargs)
        return bridge.run(result) if inspect.iscoroutine(result) else result

    setattr(task, name, run)
