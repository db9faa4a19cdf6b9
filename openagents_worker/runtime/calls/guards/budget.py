"""The budget of tool calls, those of children included. None is made when the time of the run is used up."""

from __future__ import annotations

from typing import Any

from openagents_worker.errors import MaxStepsExceeded
from openagents_worker.runtime.calls.extending import more_of, more_time
from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall

__all__ = ["budget"]


async def budget(call: ToolCall, proceed: Proceed) -> Any:
    """Raises `MaxStepsExceeded`, which ends the run even if the pattern catches it.

    If the budget pauses the run, it waits for an extension.
    """
    recorder = call.run.context.recorder
    number = call.info.number + recorder.budget.children.tool_calls
    while (limit := recorder.budget.limit("max_tool_calls")) is not None and number > limit:
        exceeded = MaxStepsExceeded(
            f"Tool call limit ({limit}) exceeded",
            tool_id=call.tool_id,
            kind="tool_calls",
            current=number - 1,
            limit=limit,
        )
        await more_of(recorder, "max_tool_calls", number - 1, limit, exceeded)
    if recorder.budget.clock is not None:
        await more_time(recorder)
    return await proceed(call)
