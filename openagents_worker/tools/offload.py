"""Offloading. The only place that runs a tool's synchronous function off the loop: in a thread or process."""

from __future__ import annotations

import asyncio
import importlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from openagents_worker.errors import ToolUnavailableError

__all__ = ["DaemonThreads", "Offload", "importable"]


P = ParamSpec("P")
T = TypeVar("T")

_Work = tuple["Future[Any]", Callable[[], Any]]


class DaemonThreads(Executor):
    """At most `limit` threads, started when there is work for them; further work waits for a free one.

    They are daemons: a thread cannot be stopped, and one that hangs must not keep the process from ending.
    """

    def __init__(self, limit: int, *, name: str) -> None:
        self.limit = limit
        self._name = name
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = self._busy = self._waiting = 0
        self._closed = False

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name}: closed")
            self._waiting += 1
            self._queue.put((future, partial(function, *args, **kwargs)))
            if self._waiting > self._threads - self._busy and self._threads < self.limit:
                self._threads += 1
                threading.Thread(target=self._main, name=f"{self._name}-{self._threads}", daemon=True).start()
        return future

    def stats(self) -> dict[str, int]:
        """`limit`, `threads` that were started, `busy` ones, and work that is `waiting` for one."""
        with self._lock:
            return {
                "limit": self.limit,
                "threads": self._threads,
                "busy": self._busy,
                "waiting": self._waiting,
            }

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:
        """Take no more work; what waits is cancelled, what runs is not waited for, whatever `wait` says."""
        with self._lock:
            self._closed = True
            threads = self._threads
        for _ in range(threads):
            self._queue.put(None)

    def _main(self) -> None:
        while (work := self._queue.get()) is not None:
            future, function = work
            with self._lock:
                self._waiting -= 1
                self._busy += 1
                wanted = not self._closed
            if wanted or not future.cancel():
                _run(future, function)
            with self._lock:
                self._busy -= 1
            del work, future, function  # or the last result lives until there is something new to do


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
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def in_process(self, function: Callable[..., Any], /, **arguments: Any) -> Any:
        """Run an `importable` function in another process: it, its arguments and its result are copied.

        Raises `ToolUnavailableError`, which may be retried, when that process dies.
        """
        if self._processes is None:
            self._processes = ProcessPoolExecutor(
                self._limit,
                multiprocessing.get_context("spawn"),  # a fork of a process with threads can deadlock
                _end_with_parent,
            )
        call = partial(_call, function.__module__, function.__qualname__, arguments)
        processes = self._processes
        try:
            return await asyncio.get_running_loop().run_in_executor(processes, call)
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
    """In the other process: find the function, behind the `@tool` that stands in its place, and call it."""
    found: Any = importlib.import_module(module)
    for name in qualname.split("."):
        found = getattr(found, name)
    return getattr(found, "function", found)(**arguments)


def _end_with_parent() -> None:
    """A worker that is killed cannot tell its children; each watches for its end itself."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(0)

    threading.Thread(target=watch, name="openagents-parent", daemon=True).start()
