"""Streamed calls: the only place that publishes what a tool yields while it works."""

from __future__ import annotations

from typing import Any

from openagents_worker.runtime.calls.executors import pieces_of
from openagents_worker.runtime.calls.tool_call import ToolCall
from openagents_worker.tools.streaming import streamed_result

__all__ = ["stream"]


async def stream(call: ToolCall) -> Any:
    """Call a tool that yields its result in pieces. Watchers get each as `tool.delta`; a replay yields only
    the result, which is what is recorded."""
    writer, call_id = call.run.writer, call.info.call_id

    async def publish(text: str) -> None:
        if text:
            call.has_streamed = True
            await writer.output(call_id, text)

    executor = call.tool.executor
    if hasattr(executor, "execute_stream"):
        pieces = pieces_of(executor, call)
    else:
        pieces = call.tool.plugin.invoke_stream(call.params, call.context)
    return await streamed_result(
        pieces,
        publish,
        tool_name=call.tool_id,
        max_chars=call.run.context.recorder.max_record_bytes,
    )
