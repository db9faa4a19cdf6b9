"""Waiting for tasks: `any_done` does what `asyncio.wait` does for the first of several futures."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from openagents_worker.concurrency import any_done


async def _settled(waiting: asyncio.Task[None]) -> bool:
    """Whether the wait has ended, after everything that is due now was executed."""
    for _ in range(5):
        await asyncio.sleep(0)
    return waiting.done()


async def _fail() -> None:
    raise ValueError("as the future has ended")


@pytest.mark.parametrize("end", ["result", "exception", "cancellation"])
async def test_it_returns_when_one_future_is_done(end: str) -> None:
    """However the future ends: its result and its exception are for the caller to read."""
    first: asyncio.Future[Any]
    first, other = (asyncio.get_running_loop().create_future() for _ in range(2))
    waiting = asyncio.create_task(any_done(first, other))
    assert not await _settled(waiting)
    match end:
        case "result":
            first.set_result(None)
        case "exception":
            first.set_exception(ValueError())
        case _:
            first.cancel()
    assert await _settled(waiting)
    assert waiting.exception() is None
    assert not other.done()
    assert first.cancelled() or first.exception() is None or isinstance(first.exception(), ValueError)


async def test_it_returns_for_a_future_that_is_done_already() -> None:
    """Nothing more has to happen to it."""
    done = asyncio.create_task(_fail())
    await asyncio.wait([done])
    await any_done(done, asyncio.get_running_loop().create_future())
    assert isinstance(done.exception(), ValueError)


async def test_it_returns_after_the_time() -> None:
    """The futures go on."""
    never = asyncio.get_running_loop().create_future()
    await any_done(never, at_most_s=0.0)
    assert not never.done()


async def test_a_cancelled_wait_leaves_the_futures_as_they_are() -> None:
    """The waiting task can be cancelled at any moment; the tasks for which it waits are not."""
    never = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(any_done(never, at_most_s=60))
    assert not await _settled(waiting)
    waiting.cancel()
    assert await _settled(waiting)
    assert waiting.cancelled()
    assert not never.done()
    never.set_result(None)  # wakes nobody


async def test_both_futures_may_be_done_at_once() -> None:
    """The second one finds the wait ended."""
    first, second = (asyncio.get_running_loop().create_future() for _ in range(2))
    waiting = asyncio.create_task(any_done(first, second))
    assert not await _settled(waiting)
    first.set_result(1)
    second.set_result(2)
    assert await _settled(waiting)
