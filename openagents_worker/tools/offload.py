"""Offloading. The only place that runs a tool's synchronous function off the loop: in a thread or process.

What runs there cannot be stopped. Whoever has to know that none of it runs any more sets `work_off_loop`.
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
    """What somebody has running in threads and processes: each piece of work from its submission to its end,
    whether it is still waited for or not."""

    def __init__(
        self,
        label: Callable[[], str] = str,
        in_thread: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
        group: str = "",
    ) -> None:
        """`label` says what is being done where work is submitted; '' where that is not known. `in_thread`,
        called there, makes what a function is called through in a thread. Where threads are scarce, those of
        one `group` share its turns."""
        self.group = group
        self.in_thread = in_thread
        self._label = label
        self._lock = threading.Lock()
        self._names: dict[Future[Any], str] = {}

    def add(self, work: Future[Any], name: str) -> None:
        label = self._label()
        with self._lock:
            self._names[work] = f"{name} ({label})" if label else name
        work.add_done_callback(self._done)

    def _done(self, work: Future[Any]) -> None:
        with self._lock:
            self._names.pop(work, None)

    async def wait(self, timeout_s: float) -> None:
        """Returns when all of it has ended, and after this time at the latest."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def tell(_: Future[Any]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(ended.set)

        with self._lock:
            running = list(self._names)
        for work in running:
            work.add_done_callback(tell)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.names():
                    ended.clear()
                    if self.names():
                        await ended.wait()

    def names(self) -> list[str]:
        """What still runs, by the names of the functions."""
        with self._lock:
            return sorted(self._names.values())


work_off_loop: ContextVar[WorkOffLoop | None] = ContextVar("openagents_work_off_loop", default=None)
"""Where work that is submitted now is noted."""


def _noted(work: Future[T], function: Callable[..., Any]) -> Future[T]:
    notes = work_off_loop.get()
    if notes is not None:
        notes.add(work, _name_of(function))
    return work


def _name_of(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.args[0] if function.args and callable(function.args[0]) else function.func
    return str(getattr(function, "__qualname__", None) or type(function).__name__)


class TrackedThreads(ThreadPoolExecutor):
    """The threads of `asyncio.to_thread`, which note what they run like those of `Offload`."""

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return _noted(super().submit(_in_thread(_awaitable), function, *args, **kwargs), function)


def _in_thread(function: Callable[P, T]) -> Callable[P, T]:
    """What the function is called through in a thread, where somebody has to know of it."""
    notes = work_off_loop.get()
    return function if notes is None else notes.in_thread(function)


def _awaitable(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the function. What would say to whoever awaits it that a coroutine has ended, or is to, and that a
    future cannot hold, is raised as a RuntimeError: as Python does it inside of a coroutine."""
    try:
        return function(*args, **kwargs)
    except (StopIteration, GeneratorExit) as error:
        raise RuntimeError(f"{type(error).__name__}: {text_of(error)}") from error


@dataclass(frozen=True, slots=True)
class Raised:
    """What a function raised, as a value: a future cannot hold every exception, and a process cannot send
    every one. `error` is None where it could not be sent."""

    text: str
    error: BaseException | None = None
    traceback: str | None = None
    """That of the other process, which an exception does not take along when it is sent."""

    def raise_again(self, function: Callable[..., Any]) -> Any:
        """Raise it where it is waited for."""
        there = None if self.traceback is None else ProcessTraceback(self.traceback)
        if self.error is None:
            raise ToolError(self.text, getattr(function, "__name__", "")) from there
        if there is not None:
            self.error.__cause__ = there
        if isinstance(self.error, StopIteration | GeneratorExit):  # in a coroutine they are signals
            raise RuntimeError(self.text) from self.error
        raise self.error


def _outcome(function: Callable[[], Any]) -> Any:
    """What the function returns, or what it raised as a value."""
    try:
        return function()
    except BaseException as error:  # noqa: BLE001 - it is the outcome of the call
        return Raised(f"{type(error).__name__}: {text_of(error)}", error)


class DaemonThreads(Executor):
    """At most `limit` threads, started when there is work for them; further work waits for a free one.

    Whose work is next is fair (`fair_queue`): runs take turns, by `work_off_loop`. The threads are daemons:
    a thread cannot be stopped, and one that hangs must not keep the process from ending.
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
        notes = work_off_loop.get()
        with self._changed:
            if self._closed:
                raise RuntimeError(f"{self._name}: closed")
            self._queue.put(
                notes.group if notes else None, notes, (future, partial(function, *args, **kwargs))
            )
            if len(self._queue) > self._threads - self._busy and self._threads < self.limit:
                self._threads += 1
                threading.Thread(target=self._main, name=f"{self._name}-{self._threads}", daemon=True).start()
            self._changed.notify()
        return future

    def stats(self) -> dict[str, int]:
        """`limit`, `threads` that were started, `busy` ones, and work that is `waiting` for one."""
        with self._changed:
            return {
                "limit": self.limit,
                "threads": self._threads,
                "busy": self._busy,
                "waiting": len(self._queue),
            }

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:
        """Take no more work; what waits is cancelled, what runs is not waited for, whatever `wait` says."""
        with self._changed:
            self._closed = True
            waiting = [self._queue.take() for _ in range(len(self._queue))]
            self._changed.notify_all()
        for future, _ in waiting:
            future.cancel()

    def _main(self) -> None:
        while (work := self._next()) is not None:
            future, function = work
            _run(future, function)
            del work, future, function  # or the last result lives until there is something new to do
            with self._changed:
                self._busy -= 1

    def _next(self) -> _Work | None:
        """The next work, once there is some; None when there will be none."""
        with self._changed:
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait()
            self._busy += 1
            return self._queue.take()


def _run(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets it
        future.set_exception(error)
    else:
        future.set_result(result)


class Offload:
    """The threads and processes in which the tools of a process run what would block its loop.

    Both are started when first needed. What runs in them cannot be stopped: after a timeout or a cancellation
    it goes on, and what it returns is dropped.
    """

    def __init__(self, *, threads: int = 64, processes: int = 0) -> None:
        """`processes` 0: as many as the machine has cores."""
        self._threads = DaemonThreads(threads, name="openagents-tool")
        self._limit = processes or os.cpu_count() or 1
        self._processes: ProcessPoolExecutor | None = None

    async def in_thread(self, function: Callable[..., T], /, **arguments: Any) -> T:
        """Run it in a thread, with the caller's context variables."""
        call = partial(copy_context().run, _with_fresh_connections, function, arguments)
        work = _noted(self._threads.submit(_in_thread(_outcome), call), function)
        outcome = await asyncio.wrap_future(work)
        value: T = outcome.raise_again(function) if isinstance(outcome, Raised) else outcome
        return value

    async def in_process(self, function: Callable[..., Any], /, **arguments: Any) -> Any:
        """Run an `importable` function in another process: it, its arguments and its result are copied.

        Raises `ToolUnavailableError`, which may be retried, when that process dies.
        """
        if self._processes is None:
            from openagents_worker.telemetry.logs import (
                is_json_log,  # a producer that defines a tool needs no log
            )

            self._processes = ProcessPoolExecutor(
                self._limit,
                multiprocessing.get_context("spawn"),  # a fork of a process with threads can deadlock
                _begin_child,
                (is_json_log(),),
            )
        call = partial(_call, function.__module__, function.__qualname__, arguments)
        processes = self._processes
        try:
            with _may_have_children():
                work = processes.submit(call)  # starts a process where none is idle
            outcome = await asyncio.wrap_future(_noted(work, function))
            return outcome.raise_again(function) if isinstance(outcome, Raised) else outcome
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
        """Take no more work and leave behind what still runs."""
        self._threads.shutdown()
        processes, self._processes = self._processes, None
        if processes is None:
            return
        children = list((processes._processes or {}).values())  # Python 3.14 has kill_workers() for this
        processes.shutdown(wait=False, cancel_futures=True)
        for child in children:
            child.kill()


@contextmanager
def _may_have_children() -> Generator[None]:
    """Let this process start others, also where it is a child of Celery's prefork pool.

    Such a child is a daemon, and multiprocessing lets a daemon start nothing: that would be left behind when
    the daemon is killed. What is started here watches for the end of its parent itself. The child's key is of
    billiard's type, which multiprocessing cannot send.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]  # nothing public says it
    before = dict(config)
    config.update(daemon=False, authkey=AuthenticationString(config["authkey"]))
    try:
        yield
    finally:
        config.update({"daemon": False, **before})


def _with_fresh_connections(function: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    """Call it as Django calls a view: with no database connection that is too old, and leaving none behind.

    A thread keeps its connections, and nobody else closes those of ours.
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
    """Whether another process can find the function by its module's and its own name."""
    return "<" not in function.__qualname__ and function.__module__ != "__main__"


def _call(module: str, qualname: str, arguments: Mapping[str, Any]) -> Any:
    """In the other process: find the function, behind the `@tool` that stands in its place, and call it.

    What it raises is sent as it is where it can be read again, else by its text: an exception that cannot be
    would end the pool, and with it the calls of every other run.
    """
    outcome = _outcome(partial(_find_and_call, module, qualname, arguments))
    if not isinstance(outcome, Raised) or outcome.error is None:
        return outcome
    traceback = traceback_text(outcome.error)
    try:
        sent = pickle.loads(pickle.dumps(outcome.error))  # noqa: S301 - what we have just written
    except Exception:  # noqa: BLE001 - whatever a class does when it is copied
        sent = None
    return Raised(outcome.text, sent if type(sent) is type(outcome.error) else None, traceback)


def _find_and_call(module: str, qualname: str, arguments: Mapping[str, Any]) -> Any:
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return getattr(found, "function", found)(**arguments)


def _begin_child(log_is_json: bool) -> None:
    from openagents_worker.telemetry.logs import begin_log_of_child  # as above

    _end_with_parent()
    begin_log_of_child(log_is_json)


def _end_with_parent() -> None:
    """A worker that is killed cannot tell its children; each watches for its end itself."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(0)

    threading.Thread(target=watch, name="openagents-parent", daemon=True).start()
