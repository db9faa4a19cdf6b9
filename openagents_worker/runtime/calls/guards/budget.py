"""The budget of tool calls: a run makes at most `max_tool_calls`."""

from __future__ import annotations

from typing import Any

from openagents_worker.errors import MaxStepsExceeded
from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall

__all__ = ["budget"]


async def budget(call: ToolCall, proceed: Proceed) -> Any:
    """Raises `MaxStepsExceeded`, which ends the run even if the pattern catches it."""
    limit = call.run.budget.max_tool_calls
    if limit is not None and call.info.number > limit:
        raise MaxStepsExceeded(f"Tool call limit ({limit}) exceeded", tool_id=call.tool_id)
    return await proceed(call)
