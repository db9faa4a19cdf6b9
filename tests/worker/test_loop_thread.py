"""The loop thread: a task body waits for a coroutine on the loop of the process."""

from __future__ import annotations

import asyncio
import inspect
import signal
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest

from openagents_worker.worker.loop_thread import LoopThread, _Beginning
from tests.support.waiting import PATIENCE_S, wait_for


class TimeLimit(BaseException):
    """An exception that interrupts a waiting thread, as a soft time limit does."""


def test_a_coroutine_runs_on_the_loop_and_its_value_comes_back(loop_thread: LoopThread) -> None:
    """Many threads may wait at once; all coroutines share one loop."""

    async def where() -> int:
        await asyncio.sleep(0)
        return threading.get_ident()

    with ThreadPoolExecutor(20) as pool:
        idents = set(pool.map(lambda _: loop_thread.run(where()), range(20)))

    assert idents == {loop_thread.thread_id}


def test_an_exception_of_the_coroutine_is_raised_in_the_task_body(loop_thread: LoopThread) -> None:
    """The traceback of a failed task names the line that failed."""

    async def fail() -> None:
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there"):
        loop_thread.run(fail())


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interruption_while_the_work_begins_cancels_the_coroutine(
    loop_thread: LoopThread, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The waiting thread is interrupted before, or just after, it has told the loop to begin."""
    finished: list[str] = []
    begin_soon = _Beginning.soon

    async def work() -> None:
        await asyncio.Event().wait()
        finished.append("never")

    def interrupted(beginning: _Beginning) -> None:
        monkeypatch.undo()
        if moment == "after":
            begin_soon(beginning)
            beginning.is_called = False
        raise TimeLimit

    coroutine = work()
    monkeypatch.setattr(_Beginning, "soon", interrupted)
    with pytest.raises(TimeLimit):
        loop_thread.run(coroutine)

    wait_for(lambda: inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED, "the coroutine is closed")
    assert not finished


def test_a_soft_limit_while_the_work_begins_is_passed_on(
    loop_thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait goes on, and the work begins once."""
    begin_soon, limits, begun = _Beginning.soon, list[Exception](), list[str]()
    is_passed_on = threading.Event()

    async def work() -> str:
        begun.append("work")
        await asyncio.to_thread(is_passed_on.wait, PATIENCE_S)  # a limit that comes later changes nothing
        return "done"

    def pass_on(limit: Exception) -> None:
        limits.append(limit)
        is_passed_on.set()

    def limited(beginning: _Beginning) -> None:
        monkeypatch.undo()
        begin_soon(beginning)
        beginning.is_called = False
        raise TimeoutError

    monkeypatch.setattr(_Beginning, "soon", limited)

    assert loop_thread.run(work(), interrupted=pass_on) == "done"
    assert [type(limit) for limit in limits] == [TimeoutError]
    assert begun == ["work"]


def test_an_interrupted_wait_cancels_the_coroutine(loop_thread: LoopThread) -> None:
    """A time limit ends the work, not only the wait."""
    state: list[str] = []

    async def work() -> None:
        state.append("started")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            state.append("cancelled")
            raise

    def interrupt(*_: Any) -> None:
        raise TimeLimit

    def interrupter() -> None:
        wait_for(lambda: state, "the coroutine has started")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    helper = threading.Thread(target=interrupter)
    helper.start()
    try:
        with pytest.raises(TimeLimit):
            loop_thread.run(work())
    finally:
        signal.signal(signal.SIGUSR1, before)
        helper.join()

    wait_for(lambda: state == ["started", "cancelled"], "the coroutine was cancelled")


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_loop_survives_exceptions_that_stop_asyncio(
    loop_thread: LoopThread, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """In a task, which then fails, and in a callback; other tasks of the loop continue."""
    other_may_end = threading.Event()

    async def leave() -> None:
        raise error("bye")

    async def leave_in_a_task() -> None:
        await asyncio.create_task(leave())

    async def other() -> str:
        while not other_may_end.is_set():
            await asyncio.sleep(0)
        return "still here"

    def in_callback() -> None:
        raise error("bye")

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(loop_thread.run, other())
        wait_for(loop_thread.work_began.is_set, "work has started on the loop")
        for work in (leave, leave_in_a_task):
            with pytest.raises(error):
                loop_thread.run(work())
        loop_thread.loop.call_soon_threadsafe(in_callback)
        wait_for(lambda: caplog.text.count("loop.exit_refused") >= 3, "each exception is logged")
        other_may_end.set()
        assert beside.result(10) == "still here"
    loop_thread.stop()
    assert loop_thread.loop.is_closed()


def test_a_soft_time_limit_is_passed_to_interrupted(loop_thread: LoopThread) -> None:
    """The wait continues until the coroutine ends."""
    stop = asyncio.Event()
    state: list[str] = []

    async def work() -> str:
        state.append("started")
        await stop.wait()
        return "stopped"

    def limit(*_: Any) -> None:
        raise TimeoutError("soft")

    def interrupted(error: Exception) -> None:
        state.append(str(error))
        loop_thread.call_soon(stop.set)

    def interrupter() -> None:
        wait_for(lambda: state, "the coroutine has started")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, limit)
    helper = threading.Thread(target=interrupter)
    helper.start()
    try:
        assert loop_thread.run(work(), interrupted=interrupted) == "stopped"
    finally:
        signal.signal(signal.SIGUSR1, before)
        helper.join()

    assert state == ["started", "soft"]


def test_no_thread_waits_for_a_loop_that_has_ended(loop_thread: LoopThread) -> None:
    """`stop` cancels all tasks and releases every waiting thread; later calls end at once."""
    started = threading.Event()

    async def work() -> None:
        started.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(loop_thread.run, work())
        assert started.wait(60)

        loop_thread.stop()

        with pytest.raises(CancelledError):
            waiting.result(5)
    with pytest.raises(CancelledError):
        loop_thread.run(work())
