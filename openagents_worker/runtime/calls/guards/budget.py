"""The budget of tool calls, with those of children. None is made when the time of the run is used up."""

from __future__ import annotations

from typing import Any

from openagents_worker.errors import MaxStepsExceeded
from openagents_worker.models import WaitKind
from openagents_worker.runtime.calls.extending import more_of, more_time
from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall

__all__ = ["budget"]


async def budget(call: ToolCall, proceed: Proceed) -> Any:
    """Raises `MaxStepsExceeded`, which ends the run even if the pattern catches it.

    If the budget pauses the run, it waits for an extension. What is left may be reserved for children: then
    it waits until one has ended.
    """
    recorder, spending = call.run.context.recorder, call.run.context.recorder.spending
    recorder.waits.begin_again(call.info, WaitKind.CHILD)
    while (limit := recorder.budget.limit("max_tool_calls")) is not None:
        made = call.info.number + spending.used_by_children.tool_calls
        number = made + int(spending.of_children("max_tool_calls"))
        if number <= limit:
            break
        if made <= limit and spending.will_settle("max_tool_calls"):
            await spending.child_settled(recorder.waits, call.info)
            continue
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
