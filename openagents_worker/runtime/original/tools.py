"""Tools of the original SDK: how its patterns call the tools of a run, and what its own tools return."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from openagents_worker.errors import ExecutionError, OpenAgentsError, StepTooDeep, StepTooLarge, ToolError
from openagents_worker.patterns.call_groups import GroupedCall, make_calls
from openagents_worker.runtime.original.errors import as_original
from openagents_worker.runtime.original.package import is_instance, loaded
from openagents_worker.tools.toolset import SingleTool

__all__ = ["OriginalTool", "single_tool", "unwrapped"]


class OriginalTool:
    """A recorded tool of a run, with the further methods and the errors of the original SDK."""

    def __init__(self, tool: Any) -> None:
        self._tool = tool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tool, name)

    @property
    def name(self) -> str:
        return str(self._tool.tool_id)

    tool_name = name

    def schema(self) -> dict[str, Any]:
        return dict(self._tool.describe().get("parameters") or {"type": "object"})

    async def invoke(self, params: dict[str, Any], context: Any = None) -> Any:
        """The result of a recorded call. Raises coded errors, which are also those of the package."""
        try:
            return await self._tool.invoke(params, context)
        except OpenAgentsError as error:
            raise as_original(error) from error.__cause__

    async def fallback(self, error: Exception, params: dict[str, Any], context: Any = None) -> None:
        """None: the recorded call has already asked the tool for a fallback."""

    async def invoke_stream(self, params: dict[str, Any], context: Any = None) -> AsyncIterator[Any]:
        """The result as one piece."""
        yield {"type": "result", "data": await self.invoke(params, context)}

    async def invoke_batch(self, items: Sequence[Any], context: Any = None) -> list[Any]:
        """The results of several calls, in order. Each is a recorded call of its own.

        They run concurrently if the tool is `concurrency_safe`, and are asked about together if it may need
        an approval. An error is the result of its call, but an error of the run, such as a budget, is raised.
        """
        return await make_calls([GroupedCall(partial(self._result_of, item), self._tool) for item in items])

    async def _result_of(self, item: Any) -> Any:
        result = loaded("interfaces.tool", "BatchResult") or SimpleNamespace
        try:
            data = await self.invoke(dict(item.params or {}))
        except (StepTooLarge, StepTooDeep) as error:
            failure: OpenAgentsError = error
        except ExecutionError:
            raise
        except OpenAgentsError as error:
            failure = error
        else:
            return result(item_id=item.item_id, success=True, data=data, error=None, exception=None)
        return result(item_id=item.item_id, success=False, data=None, error=str(failure), exception=failure)


class UnwrappedTool(SingleTool):
    """A single tool that may return a `ToolResult` or a `ToolExecutionResult` of the package."""

    async def call(self, tool_id: str, params: dict[str, Any], context: Any) -> Any:
        return unwrapped(await super().call(tool_id, params, context), tool_id)


def single_tool(tool: Any) -> SingleTool:
    """A tool as a toolset of one. Without the package, nothing is to be unwrapped."""
    is_loaded = loaded("interfaces.tool", "ToolResult") is not None
    return UnwrappedTool(tool) if is_loaded else SingleTool(tool)


def unwrapped(result: Any, tool_id: str) -> Any:
    """The data of a result object of the package, and any other result as it is.

    Raises the exception of a result that is not a success, or `ToolError`.
    """
    is_execution = is_instance(result, "interfaces.tool", "ToolExecutionResult")
    if not is_execution and not is_instance(result, "interfaces.tool", "ToolResult"):
        return result
    if result.success:
        return result.data
    if isinstance(exception := getattr(result, "exception", None), Exception):
        raise exception
    raise ToolError(result.error or "the tool reports a failure without a reason", tool_id)
