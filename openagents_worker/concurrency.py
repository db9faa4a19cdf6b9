"""The only place that waits for asyncio tasks, ends one, and steps a coroutine without a task."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Generator
from typing import Any

__all__ = ["any_done", "end_task", "yielded"]

CANCEL_AGAIN_S = 0.1


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel the task again and again until it has ended.

    One cancellation is not always enough: before Python 3.12, `asyncio.wait_for` loses a cancellation that
    arrives at the moment of its completion, and redis-py sends its commands through `asyncio.wait_for`.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_AGAIN_S)


async def any_done(*futures: asyncio.Future[Any], at_most_s: float | None = None) -> None:
    """Wait until one of the futures is done, at most `at_most_s` seconds. It cancels none of them.

    For waits of every run: `asyncio.wait` takes half as long again, because it returns two sets.
    """
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake(_: object = None) -> None:
        if not waiter.done():
            waiter.set_result(None)

    timer = None if at_most_s is None else loop.call_later(at_most_s, wake)
    for future in futures:
        future.add_done_callback(wake)
    try:
        await waiter
    finally:
        if timer is not None:
            timer.cancel()
        for future in futures:
            future.remove_done_callback(wake)


@types.coroutine
def yielded(future: Any) -> Generator[Any, Any, Any]:
    """Yield what a stepped coroutine waits for to the asyncio task that executes the caller.

    Returns the value with which the task resumes the coroutine.
    """
    try:
        return (yield future)
    finally:
        del future  # breaks a reference cycle with the traceback of its exception
