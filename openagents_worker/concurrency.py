"""Ending tasks. The only place that cancels an asyncio task and waits until it has ended."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["end_task"]

CANCEL_AGAIN_S = 0.1


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel the task again and again until it has ended.

    One cancellation is not always enough: before Python 3.12, `asyncio.wait_for` loses a cancellation that
    arrives at the moment of its completion, and redis-py sends its commands through `asyncio.wait_for`.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_AGAIN_S)
