"""The only place that makes an asyncio task end, and that steps a coroutine without creating a task."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Generator
from typing import Any

__all__ = ["end_task", "yielded"]

CANCEL_AGAIN_S = 0.1


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel the task again and again until it has ended.

    One cancellation is not always enough: before Python 3.12, `asyncio.wait_for` loses a cancellation that
    arrives at the moment of its completion, and redis-py sends its commands through `asyncio.wait_for`.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_AGAIN_S)


@types.coroutine
def yielded(future: Any) -> Generator[Any, Any, Any]:
    """Yield what a stepped coroutine waits for to the asyncio task that executes the caller.

    Returns the value with which the task resumes the coroutine.
    """
    try:
        return (yield future)
    finally:
        del future  # breaks a reference cycle with the traceback of its exception
