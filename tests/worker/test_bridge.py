"""The bridge: a task body waits for a coroutine on the process's loop."""

from __future__ import annotations

import asyncio
import signal
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest

from openagents_worker.worker.bridge import LoopThread
from tests.waiting import wait_for


class TimeLimit(BaseException):
    """As a soft time limit: it interrupts a thread that waits."""


def test_a_coroutine_runs_on_the_loop_and_its_value_comes_back(bridge: LoopThread) -> None:
    """Many threads may wait at once; all coroutines share one loop."""

    async def where() -> int:
        await asyncio.sleep(0)
        return threading.get_ident()

    with ThreadPoolExecutor(20) as pool:
        idents = set(pool.map(lambda _: bridge.run(where()), range(20)))

    assert idents == {bridge.thread_id}


def test_an_exception_of_the_coroutine_is_raised_in_the_task_body(bridge: LoopThread) -> None:
    """The traceback of a failed task names the line that failed."""

    async def fail() -> None:
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there"):
        bridge.run(fail())


def test_an_interrupted_wait_cancels_the_coroutine(bridge: LoopThread) -> None:
    """A time limit ends the work, not only the waiting for it."""
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
            bridge.run(work())
    finally:
        signal.signal(signal.SIGUSR1, before)
        helper.join()

    wait_for(lambda: state == ["started", "cancelled"], "the coroutine was cancelled")


def test_nobody_waits_for_a_loop_that_has_ended(bridge: LoopThread) -> None:
    """Stopping cancels what runs and frees every waiting thread; later calls end at once."""
    started = threading.Event()

    async def work() -> None:
        started.set()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(bridge.run, work())
        assert started.wait(5)

        bridge.stop()

        with pytest.raises(CancelledError):
            waiting.result(5)
    with pytest.raises(CancelledError):
        bridge.run(work())
