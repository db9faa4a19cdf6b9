"""The loop thread: the only place where synchronous code, such as a Celery task body, waits for a coroutine.

All runs of a process execute on one asyncio loop in its own thread, whatever pool Celery uses. A task body
calls `LoopThread.run` to wait for a coroutine there. In another pool the body blocks its own thread. In our
pool the body itself is on the loop's thread: there it runs in a greenlet, and it waits by a switch to the
asyncio task that drives the greenlet.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

from openagents_worker.concurrency import end_task, yielded
from openagents_worker.runtime.user_code import current_run, described
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.offload import TrackedThreads

__all__ = ["LoopThread", "SyncBody", "context_of", "drive", "in_thread"]

log = get_logger(__name__)

T = TypeVar("T")

STOP_TIMEOUT_S = 5.0  # for cancelled tasks to end


# --- a loop in a thread ----------------------------------------------------------------------------------


class LoopThread:
    """An asyncio loop in a daemon thread; uvloop's if that is installed.

    It does not survive a fork: create it in the process that uses it.
    """

    def __init__(self, name: str = "openagents-loop") -> None:
        self.loop = _new_loop()
        self.loop.set_task_factory(_Task.make)  # type: ignore[arg-type]  # a factory of one kind of task
        self.loop.set_default_executor(TrackedThreads(thread_name_prefix="openagents-to-thread"))
        self._is_stopping = threading.Event()
        self._waiting: set[concurrent.futures.Future[Any]] = set()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._schedstat = -1
        self.work_began = threading.Event()
        """Set when work starts on an idle loop; the waiting thread clears it."""
        self.is_busy: Callable[[], bool] = lambda: bool(self._waiting)
        """Whether work is in progress; a pool that creates tasks on the loop replaces this function."""

    def start(self) -> None:
        self._thread.start()
        with contextlib.suppress(OSError):  # not Linux
            path = f"/proc/self/task/{self._thread.native_id}/schedstat"
            self._schedstat = os.open(
                path, os.O_RDONLY | os.O_CLOEXEC
            )  # kept open: it is read many times a second

    @property
    def thread_id(self) -> int | None:
        """The thread's id in `sys._current_frames()`; None before its start."""
        return self._thread.ident

    @property
    def native_thread_id(self) -> int | None:
        """The thread's id in the operating system; None before its start."""
        return self._thread.native_id

    def waited_s(self) -> float:
        """The total time in which the thread was runnable but had no core; 0 if the system does not report
        it."""
        try:
            return int(os.pread(self._schedstat, 64, 0).split()[1]) / 1e9
        except OSError:  # not Linux, or the thread has ended
            return 0.0

    def run(
        self, work: Coroutine[Any, Any, T], *, interrupted: Callable[[Exception], None] | None = None
    ) -> T:
        """Run a coroutine on the loop and wait for its result, from a task body of any pool.

        An interruption of the wait (SystemExit, KeyboardInterrupt, a time limit, a termination) cancels the
        coroutine and is raised again. With `interrupted`, a soft time limit is passed to that function
        instead, and the wait continues until the coroutine ends. Raises `concurrent.futures.CancelledError`
        if the loop ends first, and `RuntimeError` in a callback of the loop, where the wait would never end.
        """
        if threading.get_ident() == self._thread.ident:
            if (body := self.current_body()) is not None:
                return body.wait(work)
            work.close()
            raise RuntimeError("the event loop's own callbacks cannot wait for a coroutine; await it")
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        begin = _Beginning(work, future, self.loop)
        self._waiting.add(future)
        try:
            return self._wait_for_result(begin, future, interrupted)
        except BaseException:
            future.cancel()  # has no effect if the coroutine itself has raised
            if not begin.is_called:
                begin.soon()  # and end at once: a coroutine that never begins is never closed
            raise
        finally:
            self._waiting.discard(future)

    def _wait_for_result(
        self,
        begin: _Beginning,
        future: concurrent.futures.Future[T],
        interrupted: Callable[[Exception], None] | None,
    ) -> T:
        """Begin the work, and wait for its result. An interruption is passed to `interrupted` if it is given.

        An interruption may come at any moment, also while the work begins. So the future is there before.
        """
        while True:
            try:
                if not begin.is_called:
                    begin.soon()
                    self.work_began.set()
                return future.result()
            except Exception as error:
                if interrupted is None or future.done():
                    raise
                interrupted(error)

    def current_body(self) -> SyncBody | None:
        """The body that calls this on the loop's thread; None elsewhere."""
        body = getcurrent() if threading.get_ident() == self._thread.ident else None
        return body if isinstance(body, SyncBody) else None

    def call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function on the loop's thread: at once if called there, else in the loop's next
        iteration."""
        if threading.get_ident() == self._thread.ident:
            function(*args)
        else:
            self.loop.call_soon_threadsafe(function, *args)

    def stop(self) -> None:
        """Cancel all tasks, so that no thread waits for ever, and end the loop's thread."""
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
            while not _ran_without_exit(self.loop.run_forever) and not self._is_stopping.is_set():
                pass
            while not _ran_without_exit(self._cancel_all):
                pass
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()

    def _cancel_all(self) -> None:
        """Cancel all tasks and wait for their end."""
        endings = [end_task(task) for task in asyncio.all_tasks(self.loop)]

        async def end_all() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S / 2):
                    await asyncio.gather(*endings)

        self.loop.run_until_complete(end_all())


def _ran_without_exit(run: Callable[[], object]) -> bool:
    """Run the loop. Returns False if a SystemExit or KeyboardInterrupt of a task has stopped it.

    The exception is the outcome of that task alone, so the caller starts the loop again.
    """
    try:
        run()
    except (SystemExit, KeyboardInterrupt) as error:
        log.error("loop.exit_refused", error=described(error), exc_info=error)
        return False
    return True


class _Beginning:
    """How another thread begins a coroutine on the loop, once, however often it is asked to.

    The future gets the outcome of the coroutine. Cancelling the future cancels the coroutine.
    """

    __slots__ = ("_future", "_loop", "_task", "_work", "is_called")

    def __init__(
        self,
        work: Coroutine[Any, Any, T],
        future: concurrent.futures.Future[T],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._work = work
        self._future = future
        self._loop = loop
        self._task: asyncio.Task[Any] | None = None
        self.is_called = False

    def soon(self) -> None:
        """Begin the work in the next iteration of the loop."""
        try:
            self._loop.call_soon_threadsafe(self._begin)
        except RuntimeError:  # the loop is closed
            self._work.close()
            self._future.cancel()
        self.is_called = True

    def _begin(self) -> None:
        if self._task is not None:
            return  # the thread was interrupted after it had asked the loop, and has asked it again
        self._task = self._loop.create_task(self._work)
        self._task.add_done_callback(self._deliver)
        self._future.add_done_callback(self._cancel_if_cancelled)  # at once, if it is cancelled already

    def _deliver(self, task: asyncio.Task[Any]) -> None:
        """The work has ended: the waiting thread gets its outcome."""
        if task.cancelled():
            self._future.cancel()
        if not self._future.set_running_or_notify_cancel():
            return
        if (error := task.exception()) is not None:
            self._future.set_exception(error)
        else:
            self._future.set_result(task.result())

    def _cancel_if_cancelled(self, future: concurrent.futures.Future[Any]) -> None:
        if future.cancelled() and self._task is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._task.cancel)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


class _Task(asyncio.Task[Any]):
    """A task with a readable context; asyncio's own tasks have `get_context` from Python 3.12 on."""

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
            task.add_done_callback(lambda _: work.close())  # needed if it is cancelled before its first step
        return task


def context_of(task: asyncio.Task[Any] | None) -> Context:
    """The context variables of a task of a `LoopThread`; empty without a task. Thread-safe."""
    return task.context if isinstance(task, _Task) else Context()


# --- synchronous code on the loop's thread ---------------------------------------------------------------


class SyncBody(greenlet):  # type: ignore[misc]  # greenlet ships no types
    """A greenlet for a synchronous function that waits for coroutines on the thread of their loop.

    Celery stores its stacks of tasks and requests per greenlet, so each body has its own. The body steps the
    coroutine itself, without a new asyncio task, so that `self.request` is correct inside the coroutine too.
    """

    interruption: BaseException | None = None
    """The exception that replaces the next `CancelledError` in the body, such as a time limit."""

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Step the coroutine to its end. The asyncio task that drives this body awaits its futures."""
        step: Callable[[Any], Any] = work.send
        value: Any = None
        while True:
            try:
                future = step(value)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                value = None  # an exception refers to this frame: no reference cycle
            try:
                step, value = work.send, self.parent.switch(future)
            except BaseException as interruption:  # noqa: BLE001 - raised inside the coroutine
                step, value = work.throw, interruption


async def drive(body: SyncBody) -> Any:
    """Run a body until it waits for a future, await the future, resume the body with the result."""
    body.gr_context = getcurrent().gr_context
    future = body.switch()
    while not body.dead:
        try:
            value = await yielded(future)
        except BaseException as error:  # noqa: BLE001 - raised inside the body
            future = body.throw(_as_interruption(body, error))
        else:
            future = body.switch(value)
    return future


def _as_interruption(body: SyncBody, error: BaseException) -> BaseException:
    """The exception that the body gets for a cancellation: its `interruption` if one is set."""
    interruption, task = body.interruption, asyncio.current_task()
    if interruption is None or task is None or not isinstance(error, asyncio.CancelledError):
        return error
    body.interruption = None
    task.uncancel()  # the task is interrupted, not cancelled
    return interruption


def in_thread(
    function: Callable[..., T], threads: concurrent.futures.Executor, around: Callable[..., Any] | None = None
) -> Callable[..., T]:
    """Wrap a function: called in a `SyncBody`, it blocks a thread of `threads` instead of the loop.

    The function always runs to its end: an interruption is raised after it has returned. `around` is called
    in the body and returns the wrapper through which the thread calls the function.
    """

    def call(*args: Any, **kwargs: Any) -> T:
        body = getcurrent()
        if not isinstance(body, SyncBody):
            return function(*args, **kwargs)
        through = around() if around is not None else copy_context().run
        result: T = body.wait(_wait_for_thread(threads.submit(through, function, *args, **kwargs)))
        return result

    return call


async def _wait_for_thread(blocking: concurrent.futures.Future[T]) -> T:
    """Wait until the call in the thread has ended, also after a cancellation."""
    future = asyncio.wrap_future(blocking)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        future.exception()
        raise
