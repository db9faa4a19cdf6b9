"""The announcement: watchers see a call before it is executed, and whether it must not be repeated."""

from __future__ import annotations

from typing import Any

from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall

__all__ = ["announce", "announcement"]

ONCE_HINT = "it is not called again once its outcome is stored; send its idempotency key to the receiver"


async def announcement(call: ToolCall, proceed: Proceed) -> Any:
    """Announces a call, unless watchers have seen it begin in this life of the run.

    A call with effects that was interrupted is announced again once it is decided that it is made again
    (`guards.intent`).
    """
    call.is_announced = True
    announced = call.run.context.recorder.announced
    if not announced.is_known(call.info):
        announce(call)
    with announced.in_progress(call.info):
        return await proceed(call)


def announce(call: ToolCall) -> None:
    """Emit `tool.called` and, once per attempt and tool, `run.durable_idempotency_warning`."""
    writer = call.run.writer
    params = writer.preview(call.params)
    writer.emit("tool.called", {"tool_id": call.tool_id, "params": params, "call_id": call.info.call_id})
    if not call.tool.may_repeat and call.tool_id not in call.run.warned:
        call.run.warned.add(call.tool_id)
        warning = {"run_id": call.run.context.run_id, "tool_id": call.tool_id, "hint": ONCE_HINT}
        writer.emit("run.durable_idempotency_warning", warning)
