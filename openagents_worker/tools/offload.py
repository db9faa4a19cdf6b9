"""Offloading: the only place that runs a tool's synchronous function in a thread or in another process.

Work that runs there cannot be stopped. To wait until all of it has ended, set `work_off_loop`.
"""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import AuthenticationString  # type: ignore[attr-defined]  # its stub lacks it
from typing import Any, ParamSpec, TypeVar

from openagents_worker.errors import ProcessTraceback, ToolError, ToolUnavailableError, text_of
from openagents_worker.tools.fair_queue import FairQueue
from openagents_worker.tracebacks import traceback_text

__all__ = ["DaemonThreads", "Offload", "TrackedThreads", "WorkOffLoop", "importable", "work_off_loop"]


P = ParamSpec("P")
T = TypeVar("T")

_Work = tuple["Future[Any]", Callable[[], Any]]


class WorkOffLoop:
    """Tracks the work of one owner in threads and processes, from its submission to its end.

    Work stays tracked after its caller was cancelled or timed out.
    """

    def __init__(
        self,
        label: Callable[[], str] = str,
        in_thread: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
        group: str = "",
    ) -> None:
        """`label` returns a name for the call that submits work; '' if there is none. `in_thread` is called
        when work is submitted and wraps the function that a thread will call. When all threads are busy,
        owners of the same `group` share that group's turns (see `FairQueue`)."""
        self.group = group
        self.in_thread = in_thread
        self._label = label
        self._lock = threading.Lock()
        self._names: dict[Future[Any], str] = {}

    def add(self, work: Future[Any], name: str) -> None:
        label = self._label()
        with self._lock:
            self._names[work] = f"{name} ({label})" if label else name
        work.add_done_callback(self._forget)

    def _forget(self, work: Future[Any]) -> None:
        with self._lock:
            self._names.pop(work, None)

    async def wait(self, timeout_s: float) -> None:
        """Return when all tracked work has ended, or after `timeout_s` seconds."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def wake_waiter(_: Future[Any]) -> None:
            with suppress(RuntimeError):  # the loop is closed, so there is no waiter
                loop.call_soon_threadsafe(ended.set)

        with self._lock:
            running = list(self._names)
        for work in running:
            work.add_done_callback(wake_waiter)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.names():
                    ended.clear()
                    if self.names():
                        await ended.wait()

    def names(self) -> list[str]:
        """The names of the functions that still run."""
        with self._lock:
            return sorted(self._names.values())


work_off_loop: ContextVar[WorkOffLoop | None] = ContextVar("openagents_work_off_loop", default=None)
"""The tracker of the work that is submitted in this context; None: work is not tracked."""


def _tracked(work: Future[T], function: Callable[..., Any]) -> Future[T]:
    tracker = work_off_loop.get()
    if tracker is not None:
        tracker.add(work, _name_of(function))
    return work


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.args[0] if function.args and callable(function.args[0]) else function.func
    return str(getattr(function, "__qualname__", None) or type(function).__name__)


class TrackedThreads(ThreadPoolExecutor):
    """The executor of `asyncio.to_thread`. Its work is tracked like that of `Offload`."""

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return _tracked(
            super().submit(_wrapped_for_thread(_without_coroutine_signals), function, *args, **kwargs),
            function,
        )


def _wrapped_for_thread(function: Callable[P, T]) -> Callable[P, T]:
    """The function, wrapped by the tracker's `in_thread` if there is a tracker."""
    tracker = work_off_loop.get()
    return function if tracker is None else tracker.in_thread(function)


def _without_coroutine_signals(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the function. StopIteration and GeneratorExit become a RuntimeError, as inside a coroutine: a
    future cannot hold them, and an awaiting coroutine would take them for control signals."""
    try:
        return function(*args, **kwargs)
    except (StopIteration, GeneratorExit) as error:
        raise RuntimeError(f"{type(error).__name__}: {text_of(error)}") from error


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception as a value: a future cannot hold every exception, and not every one can be pickled.
    `error` is None if it could not be pickled."""

    text: str
    error: BaseException | None = None
    traceback: str | None = None
    """The traceback in the other process; pickling an exception loses it."""

    def reraise(self, function: Callable[..., Any]) -> Any:
        """Raise the exception in the coroutine that awaits the work."""
        cause = None if self.traceback is None else ProcessTraceback(self.traceback)
        if self.error is None:
            raise ToolError(self.text, getattr(function, "__name__", "")) from cause
        if cause is not None:
            self.error.__cause__ = cause
        if isinstance(self.error, StopIteration | GeneratorExit):  # control signals in a coroutine
            raise RuntimeError(self.text) from self.error
        raise self.error


def _outcome_of(function: Callable[[], Any]) -> Any:
    """The function's result, or a `Raised` for its exception."""
    try:
        return function()
    except BaseException as error:  # noqa: BLE001 - it is the outcome of the call
        return Raised(f"{type(error).__name__}: {text_of(error)}", error)


class DaemonThreads(Executor):
    """An executor with at most `limit` daemon threads, started on demand. More work waits for a free thread.

    Waiting work is scheduled fairly (`FairQueue`), with the tracker in `work_off_loop` as its owner. The
    threads are daemons because a thread cannot be stopped, and one that hangs must not block the exit of the
    process.
    """

    def __init__(self, limit: int, *, name: str) -> None:
        self.limit = limit
        self._name = name
        self._queue: FairQueue[_Work] = FairQueue()
        self._changed = threading.Condition(threading.Lock())
        self._threads = self._busy = 0
        self._closed = False

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        tracker = work_off_loop.get()
        with self._changed:
            if self._closed:
                raise RuntimeError(f"{self._name}: closed")
            self._queue.put(
                tracker.group if tracker else None, tracker, (future, partial(function, *args, **kwargs))
            )
            if len(self._queue) > self._threads - self._busy and self._threads < self.limit:
                self._threads += 1
                threading.Thread(
                    target=self._work_loop, name=f"{self._name}-{self._threads}", daemon=True
                ).start()
            self._changed.notify()
        return future

    def stats(self) -> dict[str, int]:
        """Counts: `limit`, `threads` started, `busy` threads, and `waiting` pieces of work."""
        with self._changed:
            return {
                "limit": self.limit,
                "threads": self._threads,
                "busy": self._busy,
                "waiting": len(self._queue),
            }

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:
        """Accept no more work and cancel what waits. Running work is never waited for: `wait` is ignored."""
        with self._changed:
            self._closed = True
            waiting = [self._queue.take() for _ in range(len(self._queue))]
            self._changed.notify_all()
        for future, _ in waiting:
            future.cancel()

    def _work_loop(self) -> None:
        while (work := self._next_work()) is not None:
            future, function = work
            _run_work(future, function)
            del work, future, function  # otherwise an idle thread would keep the last result in memory
            with self._changed:
                self._busy -= 1

    def _next_work(self) -> _Work | None:
        """Wait for the next piece of work; None after `shutdown`."""
        with self._changed:
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            self._busy += 1
            return self._queue.take()


def _run_work(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001 - it is raised where the future is awaited
        future.set_exception(error)
    else:
        future.set_result(result)


class Offload:
    """The threads and processes in which a worker process runs the blocking functions of its tools.

    They are started at first use. Work in them cannot be stopped: after a timeout or a cancellation it
    continues, and its result is dropped.
    """

    def __init__(self, *, threads: int = 64, processes: int = 0) -> None:
        """The largest numbers of threads and processes. `processes` 0: the number of cores."""
        self._threads = DaemonThreads(threads, name="openagents-tool")
        self._limit = processes or os.cpu_count() or 1
        self._processes: ProcessPoolExecutor | None = None

    async def in_thread(self, function: Callable[..., T], /, **arguments: Any) -> T:
        """Run the function in a thread, with the caller's context variables."""
        call = partial(copy_context().run, _call_with_fresh_db_connections, function, arguments)
        work = _tracked(self._threads.submit(_wrapped_for_thread(_outcome_of), call), function)
        outcome = await asyncio.wrap_future(work)
        value: T = outcome.reraise(function) if isinstance(outcome, Raised) else outcome
        return value

    async def in_process(self, function: Callable[..., Any], /, **arguments: Any) -> Any:
        """Run an `importable` function in another process. Its arguments and its result are pickled.

        Raises `ToolUnavailableError`, which is retryable, if that process dies.
        """
        if self._processes is None:
            from openagents_worker.telemetry.logs import (
                is_json_log,  # imported late: a producer that defines a tool needs no log
            )

            self._processes = ProcessPoolExecutor(
                self._limit,
                multiprocessing.get_context("spawn"),  # a fork of a process with threads can deadlock
                _initialize_child,
                (is_json_log(),),
            )
        call = partial(_call_in_child, function.__module__, function.__qualname__, arguments)
        processes = self._processes
        try:
            with _children_allowed():
                work = processes.submit(call)  # starts a process where none is idle
            outcome = await asyncio.wrap_future(_tracked(work, function))
            return outcome.reraise(function) if isinstance(outcome, Raised) else outcome
        except BrokenProcessPool as error:
            if self._processes is processes:
                self._processes = None
            raise ToolUnavailableError(
                f"the process that ran {function.__qualname__} has ended",
                function.__name__,
                hint="out of memory, or a crash in native code",
            ) from error

    def stats(self) -> dict[str, Any]:
        started = self._processes is not None
        return {"threads": self._threads.stats(), "processes": {"limit": self._limit, "started": started}}

    def close(self) -> None:
        """Accept no more work. Running threads are left alone, processes are killed."""
        self._threads.shutdown()
        processes, self._processes = self._processes, None
        if processes is None:
            return
        children = list((processes._processes or {}).values())  # Python 3.14 has kill_workers() for this
        processes.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.kill()


@contextmanager
def _children_allowed() -> Generator[None]:
    """Allow this process to start children, even if it is a child of Celery's prefork pool.

    A prefork child is a daemon, and multiprocessing does not let a daemon start processes, because they would
    outlive a killed daemon. The processes started here watch their parent and exit with it. The `authkey` is
    replaced too: it has billiard's type, which multiprocessing cannot pickle.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # there is no public API
    before = dict(config)
    config.update(daemon=False, authkey=AuthenticationString(config["authkey"]))
    try:
        yield
    finally:
        config.update({"daemon": False, **before})


def _call_with_fresh_db_connections(function: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    """Call the function as Django calls a view: close expired database connections before and after.

    Each thread has its own Django connections, and Django itself closes them only around requests.
    """
    _close_old_connections()
    try:
        return function(**arguments)
    finally:
        _close_old_connections()


def _close_old_connections() -> None:
    conf, db = sys.modules.get("django.conf"), sys.modules.get("django.db")
    if conf is not None and db is not None and conf.settings.configured:
        db.close_old_connections()


def importable(function: Callable[..., Any]) -> bool:
    """Whether another process can import the function by its module and qualified name."""
    return "<" not in function.__qualname__ and function.__module__ != "__main__"


def _call_in_child(module: str, qualname: str, arguments: Mapping[str, Any]) -> Any:
    """Runs in the child process: import the function, unwrap `@tool`, and call it.

    An exception is sent as it is if it survives pickling, otherwise as text: an exception that cannot be
    unpickled would break the pool, and so the calls of all other runs.
    """
    outcome = _outcome_of(partial(_find_and_call, module, qualname, arguments))
    if not isinstance(outcome, Raised) or outcome.error is None:
        return outcome
    traceback = traceback_text(outcome.error)
    try:
        copied = pickle.loads(pickle.dumps(outcome.error))  # noqa: S301 - pickled on the same line
    except Exception:  # noqa: BLE001 - the class of the exception may raise anything when it is copied
        copied = None
    return Raised(outcome.text, copied if type(copied) is type(outcome.error) else None, traceback)


def _find_and_call(module: str, qualname: str, arguments: Mapping[str, Any]) -> Any:
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return getattr(found, "function", found)(**arguments)


def _initialize_child(log_is_json: bool) -> None:
    from openagents_worker.telemetry.logs import begin_log_of_child  # as above

    _exit_with_parent()
    begin_log_of_child(log_is_json)


def _exit_with_parent() -> None:
    """Exit when the parent ends. A killed worker cannot stop its children, so each one watches it."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(0)

    threading.Thread(target=watch, name="openagents-parent", daemon=True).start()
