"""Ending tasks. The only place that cancels an asyncio task and knows that it has ended."""

from __future__ import annotations

import asyncio
from typing import Any

__all__ = ["end_task"]

CANCEL_AGAIN_S = 0.1


async def end_task(task: asyncio.Task[Any]) -> None:
    """Cancel a task of ours until it has ended.

    Once is not always enough: below Python 3.12 `asyncio.wait_for` swallows a cancellation that comes in the
    moment in which it is done, and redis-py sends its commands through it.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=CANCEL_AGAIN_S)
