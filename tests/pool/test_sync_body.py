"""Sync bodies: synchronous functions that wait for coroutines on the loop's own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator

import pytest

from openagents_worker.tools.offload import DaemonThreads
from openagents_worker.worker.loop_thread import LoopThread, SyncBody, drive, in_thread
from tests.support.waiting import PATIENCE_S, await_for


@pytest.fixture
def loop_thread() -> Generator[LoopThread]:
    thread = LoopThread()
    thread.start()
    yield thread
    thread.stop()


def test_bodies_that_wait_take_turns_on_one_thread(loop_thread: LoopThread) -> None:
    """A hundred bodies wait at the same time without an additional thread."""
    threads = set(threading.enumerate())  # one of an earlier test may just be ending
    waiting, all_wait = 0, asyncio.Event()

    async def wait_for_the_others() -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 100:
            all_wait.set()
        await all_wait.wait()

    def body() -> int:
        loop_thread.run(wait_for_the_others())
        return threading.get_ident()

    async def all_of_them() -> list[int]:
        async def one() -> int:
            ident: int = await drive(SyncBody(body))
            return ident

        return await asyncio.gather(*(one() for _ in range(100)))

    idents = loop_thread.run(all_of_them())

    assert set(idents) == {loop_thread.thread_id}
    assert set(threading.enumerate()) <= threads


def test_a_time_limit_is_raised_in_the_body(loop_thread: LoopThread) -> None:
    """Once; the asyncio task that drives the body is not cancelled."""

    class Limit(Exception):
        pass

    begun = asyncio.Event()

    async def wait_for_ever() -> None:
        begun.set()
        await asyncio.Event().wait()

    def body() -> str:
        try:
            loop_thread.run(wait_for_ever())
        except Limit:
            loop_thread.run(asyncio.sleep(0))  # it may still wait, to clean up
        return "cleaned up"

    async def limited() -> object:
        sync_body = SyncBody(body)

        async def one() -> object:
            return await drive(sync_body)

        task = asyncio.create_task(one())
        await begun.wait()
        sync_body.interruption = Limit()
        task.cancel()
        return await task

    assert loop_thread.run(limited()) == "cleaned up"


def test_a_blocking_call_in_a_body_blocks_a_thread(loop_thread: LoopThread) -> None:
    """The call runs to its end even if the body is cancelled meanwhile."""
    blocking, done = DaemonThreads(1, name="test-blocking"), []
    begun, may_end = threading.Event(), threading.Event()

    def store() -> None:
        begun.set()
        may_end.wait(PATIENCE_S)
        done.append(threading.current_thread().name)

    async def cancelled() -> None:
        async def one() -> None:
            await drive(SyncBody(in_thread(store, blocking)))

        task = asyncio.create_task(one())
        await await_for(begun.is_set, "the thread is blocked")
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop_thread.run(cancelled())

    assert done == ["test-blocking-1"]
    blocking.shutdown()


def test_a_callback_of_the_loop_cannot_wait_for_the_loop(loop_thread: LoopThread) -> None:
    """It would wait for itself for ever, so it raises an error at once."""

    async def call_back() -> None:
        loop_thread.run(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="await it"):
        loop_thread.run(call_back())
