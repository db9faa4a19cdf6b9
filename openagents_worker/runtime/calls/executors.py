"""Executors of the deployment: the only place that lets a class of its own make the calls of tools.

The class has `execute(request)`, as the executors of the original SDK: it calls `request.tool.invoke` and
returns the result, an object with `success`, `data`, `error` and `exception`. The call has passed the guards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from openagents_worker.errors import ToolError
from openagents_worker.jsontext import MAX_NESTING, NestedTooDeeply, replaced
from openagents_worker.runtime.calls.tool_call import BoundTool, ToolCall
from openagents_worker.runtime.original.tools import unwrapped
from openagents_worker.tools.base import ToolExecutionSpec

__all__ = ["ToolExecutionRequest", "execute_by", "pieces_of"]

RESULT = ("success", "data", "error")


class ToolExecutionRequest(BaseModel):
    """What an executor of the deployment gets: the call of a tool."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    tool_id: str
    tool: Any
    params: dict[str, Any] = Field(default_factory=dict)
    context: Any = None
    execution_spec: ToolExecutionSpec = ToolExecutionSpec()
    metadata: dict[str, Any] = Field(default_factory=dict)
    cancel_event: Any = None
    """None: a cancelled call is cancelled as every task is."""


class _CalledTool:
    """A tool of an agent, called through its toolset."""

    def __init__(self, tool: BoundTool) -> None:
        self._tool = tool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tool.plugin, name)

    async def invoke(self, params: dict[str, Any], context: Any = None) -> Any:
        return await self._tool.toolset.call(self._tool.tool_id, params, context)


async def execute_by(executor: Any, call: ToolCall) -> Any:
    """The result of a call that the executor makes. Raises the exception of a result without success."""
    result = await executor.execute(_request(call))
    missing = [name for name in RESULT if not hasattr(result, name)]
    if missing:
        raise ToolError(
            f"{type(executor).__name__}.execute returned a {type(result).__name__}, which has no "
            f"{' and no '.join(missing)}",
            call.tool_id,
            hint="return an object with success, data, error and exception",
        )
    _note_metadata(call, getattr(result, "metadata", None))
    if not result.success:
        exception = getattr(result, "exception", None)
        if isinstance(exception, Exception):
            raise exception
        raise ToolError(str(result.error or "the executor gives no reason"), call.tool_id)
    return unwrapped(result.data, call.tool_id)


async def pieces_of(executor: Any, call: ToolCall) -> AsyncIterator[Any]:
    """The pieces of a streamed call that the executor makes."""
    async for piece in executor.execute_stream(_request(call)):
        yield piece


def _request(call: ToolCall) -> ToolExecutionRequest:
    return ToolExecutionRequest(
        tool_id=call.tool_id,
        tool=_CalledTool(call.tool),
        params=call.params,
        context=call.context,
        execution_spec=call.tool.spec,
    )


def _note_metadata(call: ToolCall, metadata: Any) -> None:
    """What the executor says about the call is shown in the event of its end, if it is JSON."""
    if isinstance(metadata, dict) and metadata:
        try:
            call.executor_metadata = {**call.executor_metadata, **replaced(metadata, MAX_NESTING)}
        except (TypeError, ValueError, RecursionError, NestedTooDeeply):
            call.executor_metadata = {**call.executor_metadata, "unreadable": True}
