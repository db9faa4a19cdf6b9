"""The event loop in a thread of its own, for a library that may block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.llm.library_thread import LibraryThread
from tests.support.waiting import await_for


async def test_a_call_runs_in_the_thread_in_the_context_of_the_caller() -> None:
    thread = LibraryThread("library")
    token = current_call.set(CallInfo("r1", "c", "k", 0))

    async def where() -> tuple[str, str]:
        call = current_call.get()
        return threading.current_thread().name, call.run_id if call else ""

    assert await thread.call(where) == ("library", "r1")
    current_call.reset(token)
    await thread.aclose()


async def test_an_error_is_raised_where_the_call_is_awaited() -> None:
    thread = LibraryThread("library")

    async def fails() -> None:
        raise KeyError("x")

    async def one_and_an_error() -> AsyncIterator[int]:
        yield 1
        raise KeyError("x")

    with pytest.raises(KeyError):
        await thread.call(fails)
    items = thread.items(one_and_an_error)
    assert await anext(items) == 1
    with pytest.raises(KeyError):
        await anext(items)
    await thread.aclose()


async def test_a_call_that_is_cancelled_is_cancelled_in_the_thread() -> None:
    """A call of a reply, and one of its pieces. The iterator is closed before the caller continues."""
    thread, entered, closed = LibraryThread("library"), threading.Event(), threading.Event()

    async def waits() -> None:
        try:
            entered.set()
            await asyncio.get_running_loop().create_future()
        finally:
            closed.set()

    async def waits_between() -> AsyncIterator[int]:
        yield 1
        await waits()

    async def read() -> None:
        async for _ in thread.items(waits_between):
            pass

    for work in (thread.call(waits), read()):
        entered.clear()
        closed.clear()
        task = asyncio.ensure_future(work)
        await await_for(entered.is_set, "the call runs")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await await_for(closed.is_set, "the call is cancelled in the thread")
    await thread.aclose()


async def test_what_a_library_leaves_behind_ends_with_the_thread() -> None:
    """And the next call starts another thread."""
    thread, ended = LibraryThread("library"), threading.Event()
    tasks: list[asyncio.Task[None]] = []

    async def background() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()

    async def leaves() -> str:
        tasks.append(asyncio.create_task(background()))
        await asyncio.sleep(0)
        return threading.current_thread().name

    assert await thread.call(leaves) == "library"
    await thread.aclose()
    assert ended.is_set()
    assert await thread.call(leaves) == "library"
    await thread.aclose()
