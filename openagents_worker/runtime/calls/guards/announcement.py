"""The announcement: watchers see a call before it is executed, and whether it must not be repeated."""

from __future__ import annotations

from typing import Any

from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall

__all__ = ["announcement"]

ONCE_HINT = "it is not called again once its outcome is stored; send its idempotency key to the receiver"


async def announcement(call: ToolCall, proceed: Proceed) -> Any:
    """Emits `tool.called` and, once per attempt and tool, `run.durable_idempotency_warning`.

    Not again for a call whose job goes on.
    """
    call.is_announced = True
    if call.goes_on:
        return await proceed(call)
    writer = call.run.writer
    params = writer.preview(call.params)
    writer.emit("tool.called", {"tool_id": call.tool_id, "params": params, "call_id": call.info.call_id})
    if not call.tool.may_repeat and call.tool_id not in call.run.warned:
        call.run.warned.add(call.tool_id)
        warning = {"run_id": call.run.context.run_id, "tool_id": call.tool_id, "hint": ONCE_HINT}
        writer.emit("run.durable_idempotency_warning", warning)
    return await proceed(call)
