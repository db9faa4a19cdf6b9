"""The order: calls of one turn are asked about together, but executed one after the other."""

from __future__ import annotations

from typing import Any

from openagents_worker.patterns.call_order import earlier_calls, wait_for_earlier_calls
from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall

__all__ = ["order"]


async def order(call: ToolCall, proceed: Proceed) -> Any:
    """Waits for the calls that the pattern has put before this one."""
    if earlier_calls.get():
        with call.run.context.recorder.in_progress.waiting():
            await wait_for_earlier_calls()
    return await proceed(call)
