"""The deadline: a call of a tool takes at most the time that the agents file or the tool allows."""

from __future__ import annotations

import asyncio
from typing import Any

from openagents_worker.errors import ToolTimeoutError
from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall, needed_if

__all__ = ["deadline"]


@needed_if(lambda tool, _: tool.timeout_ms is not None and not tool.is_background)
async def deadline(call: ToolCall, proceed: Proceed) -> Any:
    """Cancels the call when its time is over. Raises `ToolTimeoutError`. A job has a limit of its own."""
    limit_ms = call.tool.timeout_ms
    if limit_ms is None:
        return await proceed(call)
    timer = asyncio.timeout(limit_ms / 1000)
    try:
        async with timer:
            return await proceed(call)
    except TimeoutError as error:
        if not timer.expired():
            raise
        raise ToolTimeoutError(f"Tool {call.tool_id!r} timed out after {limit_ms}ms", call.tool_id) from error
