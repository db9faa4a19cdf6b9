"""The bridge. The only place where synchronous code, as every Celery task body is, waits for a coroutine.

All runs of a process live on one asyncio loop in a thread of its own, whatever pool Celery works with, and
`LoopThread.run` is how a task body gets there. In a thread of another pool it waits as threads do. In our own
pool the task body is itself on the loop's thread: there it runs in a greenlet, and waiting is a switch to the
asyncio task that carries the greenlet.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import types
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from openagents_worker.concurrency import end_task
from openagents_worker.runtime.user_code import current_run, described
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.offload import TrackedThreads

__all__ = ["LoopThread", "SyncBody", "drive", "context_of", "in_thread"]

log = get_logger(__name__)

T = TypeVar("T")

STOP_TIMEOUT_S = 5.0  # cancelled tasks only have to let go


# --- a loop in a thread ----------------------------------------------------------------------------------


class LoopThread:
    """An asyncio loop in a daemon thread; uvloop's where that is installed.

    It does not survive a fork: whoever needs one makes it in the process that uses it.
    """

    def __init__(self, name: str = "openagents-loop") -> None:
        self.loop = _new_loop()
        self.loop.set_task_factory(_Task.make)  # type: ignore[arg-type]  # a factory of one kind of task
        self.loop.set_default_executor(TrackedThreads(thread_name_prefix="openagents-to-thread"))
        self._is_stopping = threading.Event()
        self._waiting: set[concurrent.futures.Future[Any]] = set()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._schedstat = -1
        self.began = threading.Event()
        """Set when somebody begins to work here; whoever waits for that clears it."""
        self.is_busy: Callable[[], bool] = lambda: bool(self._waiting)
        """Whether somebody works here; a pool that starts tasks on the loop itself answers for them."""

    def start(self) -> None:
        self._thread.start()
        with contextlib.suppress(OSError):  # not Linux
            path = f"/proc/self/task/{self._thread.native_id}/schedstat"
            self._schedstat = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # asked for many times a second

    @property
    def thread_id(self) -> int | None:
        """What `sys._current_frames()` knows the thread by; None before its start."""
        return self._thread.ident

    @property
    def native_thread_id(self) -> int | None:
        """What the system knows the thread by; None before its start."""
        return self._thread.native_id

    def waited_s(self) -> float:
        """How long the thread was ready to run but had no core, in its whole life; 0 where nobody knows."""
        try:
            return int(os.pread(self._schedstat, 64, 0).split()[1]) / 1e9
        except OSError:  # not Linux, or the thread has ended
            return 0.0

    def run(
        self, work: Coroutine[Any, Any, T], *, interrupted: Callable[[Exception], None] | None = None
    ) -> T:
        """Run a coroutine on the loop and wait for it here, in whatever pool's task body this is.

        When the waiting is interrupted (SystemExit, KeyboardInterrupt, a time limit, a termination), the
        coroutine is cancelled and the interruption goes on. With `interrupted` a soft time limit is given to
        that instead, and waited on: the coroutine ends in its own way. Raises
        `concurrent.futures.CancelledError` when the loop ends first, `RuntimeError` in a callback of the
        loop, which would wait for itself.
        """
        if threading.get_ident() == self._thread.ident:
            return _own_body(work).wait(work)
        try:
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        except RuntimeError:  # the loop is closed
            work.close()
            raise concurrent.futures.CancelledError from None
        self._waiting.add(future)
        self.began.set()
        try:
            return _result(future, interrupted)
        except BaseException:
            future.cancel()  # without effect when it was the coroutine that raised
            raise
        finally:
            self._waiting.discard(future)

    def soon(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function on the loop's thread: now, where that is the caller's, else in its next turn."""
        if threading.get_ident() == self._thread.ident:
            function(*args)
        else:
            self.loop.call_soon_threadsafe(function, *args)

    def stop(self) -> None:
        """Cancel whatever still runs, so that nobody waits for ever, and end the thread."""
        if not self._thread.is_alive():
            return
        self._is_stopping.set()
        for future in list(self._waiting):
            future.cancel()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        schedstat, self._schedstat = self._schedstat, -1
        if schedstat >= 0:
            os.close(schedstat)

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            while not _survived(self.loop.run_forever) and not self._is_stopping.is_set():
                pass
            while not _survived(self._cancel_all):
                pass
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()

    def _cancel_all(self) -> None:
        endings = [end_task(task) for task in asyncio.all_tasks(self.loop)]

        async def end_all() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S / 2):
                    await asyncio.gather(*endings)

        self.loop.run_until_complete(end_all())


def _survived(run: Callable[[], object]) -> bool:
    """Run the loop; False when something on it has raised what asyncio ends a loop for.

    That concerns only whoever raised it: a task has it as its outcome, and the loop goes on.
    """
    try:
        run()
    except (SystemExit, KeyboardInterrupt) as error:
        log.error("loop.exit_refused", error=described(error), exc_info=error)
        return False
    return True


def _result(future: concurrent.futures.Future[T], interrupted: Callable[[Exception], None] | None) -> T:
    """The future's result. What interrupts the waiting is given to `interrupted`, where there is one."""
    while True:
        try:
            return future.result()
        except Exception as error:
            if interrupted is None or future.done():
                raise
            interrupted(error)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class _Task(asyncio.Task[Any]):
    """A task whose context can be asked for; asyncio's own can say it from Python 3.12 on."""

    __slots__ = ("context",)

    context: Context

    @classmethod
    def make(
        cls,
        loop: asyncio.AbstractEventLoop,
        work: Coroutine[Any, Any, Any],
        context: Context | None = None,
        **more: Any,
    ) -> _Task:
        context = copy_context() if context is None else context
        run = context.get(current_run)
        task = cls(work if run is None else run.contain_exits(work), loop=loop, context=context, **more)
        task.context = context
        if run is not None:
            run.track_task(task)
            task.add_done_callback(lambda _: work.close())  # where it is cancelled before its first step
        return task


def context_of(task: asyncio.Task[Any] | None) -> Context:
    """The context variables of a task of a `LoopThread`, from any thread; empty where there is no task."""
    return task.context if isinstance(task, _Task) else Context()


# --- synchronous code on the loop's thread ---------------------------------------------------------------


class SyncBody(greenlet):  # type: ignore[misc]  # greenlet ships no types
    """A synchronous function that can wait for coroutines on the thread of their loop.

    Celery keeps its stacks of tasks and requests by greenlet, so each body has its own. A coroutine that it
    waits for is stepped in here and not in a task of its own: `self.request` is right inside of it, too.
    """

    interruption: BaseException | None = None
    """What the body meets instead of the next cancellation: a time limit has a name of its own."""

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Step the coroutine to its end; what it waits for, the task waits for that carries this body."""
        step: Callable[[Any], Any] = work.send
        value: Any = None
        while True:
            try:
                future = step(value)
            except StopIteration as end:
                result: T = end.value
                return result
            try:
                step, value = work.send, self.parent.switch(future)
            except BaseException as interruption:  # noqa: BLE001 - it is the coroutine's, and goes on from there
                step, value = work.throw, interruption


@types.coroutine
def drive(body: SyncBody) -> Generator[Any, Any, Any]:
    """Await a body: run it until it waits, wait in its place, let it go on with what came of it."""
    body.gr_context = getcurrent().gr_context
    future = body.switch()
    while not body.dead:
        try:
            value = yield future
        except BaseException as error:  # noqa: BLE001 - every interruption is the body's
            future = body.throw(_named(body, error))
        else:
            future = body.switch(value)
    return future


def _named(body: SyncBody, error: BaseException) -> BaseException:
    interruption, task = body.interruption, asyncio.current_task()
    if interruption is None or task is None or not isinstance(error, asyncio.CancelledError):
        return error
    body.interruption = None
    task.uncancel()  # it is not asked to end, only to notice
    return interruption


def _own_body(work: Coroutine[Any, Any, Any]) -> SyncBody:
    body = getcurrent()
    if isinstance(body, SyncBody):
        return body
    work.close()
    raise RuntimeError("the event loop's own callbacks cannot wait for a coroutine; await it")


def in_thread(
    function: Callable[..., T], threads: concurrent.futures.Executor, around: Callable[..., Any] | None = None
) -> Callable[..., T]:
    """The same function; called in a `SyncBody`, it blocks a thread of `threads` instead of the loop.

    It is never left half done: an interruption is raised once it has returned. `around`, called here, makes
    what the function is called through there.
    """

    def call(*args: Any, **kwargs: Any) -> T:
        body = getcurrent()
        if not isinstance(body, SyncBody):
            return function(*args, **kwargs)
        through = around() if around is not None else copy_context().run
        result: T = body.wait(_finished(threads.submit(through, function, *args, **kwargs)))
        return result

    return call


async def _finished(blocking: concurrent.futures.Future[T]) -> T:
    future = asyncio.wrap_future(blocking)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        future.exception()
        raise
