"""Tools of the original SDK: how its patterns call the tools of a run, and what its own tools return."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from openagents_worker.errors import (
    ExecutionError,
    OpenAgentsError,
    StepTooDeep,
    StepTooLarge,
    ToolError,
    ToolNotFoundError,
)
from openagents_worker.patterns.call_groups import GroupedCall, make_calls
from openagents_worker.runtime.original.errors import as_original
from openagents_worker.runtime.original.package import is_instance, loaded
from openagents_worker.tools.jobs import JobHandle, JobStatus
from openagents_worker.tools.toolset import SingleTool

__all__ = ["OriginalTool", "single_tool", "unwrapped"]


class OriginalTool:
    """A recorded tool of a run, with the further methods and the errors of the original SDK."""

    def __init__(self, tool: Any) -> None:
        self._tool = tool
        self._background: dict[str, asyncio.Task[Any]] = {}

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

    # --- calls in the background -------------------------------------------------------------------------

    async def invoke_background(self, params: dict[str, Any], context: Any = None) -> Any:
        """The handle of a recorded call that goes on beside the pattern. It passes the guards of any call."""
        job_id = f"{self.name}:{len(self._background) + 1}"
        task = asyncio.create_task(self.invoke(dict(params or {})), name=f"in background {job_id}")
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._background[job_id] = task
        kind = loaded("interfaces.tool", "JobHandle") or JobHandle
        started = await self._tool.context.now()
        return kind(job_id=job_id, tool_id=self.name, status="running", created_at=started.timestamp())

    async def poll_job(self, handle: Any, context: Any = None) -> Any:
        """The state of such a call, recorded: a later attempt gets the same one."""
        return (loaded("interfaces.tool", "JobStatus") or JobStatus)(**await self._state_of(handle))

    async def cancel_job(self, handle: Any, context: Any = None) -> bool:
        """Cancel such a call, and its job at its service. Returns whether it was still going on, recorded."""
        state = await self._state_of(handle)
        self._background[handle.job_id].cancel()
        return bool(state["status"] == "running")

    async def _state_of(self, handle: Any) -> dict[str, Any]:
        """The recorded state of a call in the background. Raises `ToolNotFoundError`."""
        task = self._background.get(handle.job_id)
        if task is None:
            raise as_original(ToolNotFoundError(f"there is no job {handle.job_id!r}", self.name))

        async def state(job_id: str) -> dict[str, Any]:
            return _state(job_id, task)

        found: dict[str, Any] = await self._tool.context.step(f"{self.name}.poll", state, handle.job_id)
        return found

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


def _state(job_id: str, task: asyncio.Task[Any]) -> dict[str, Any]:
    """The state of a call in the background, as the fields of a `JobStatus`."""
    if not task.done():
        return {"job_id": job_id, "status": "running"}
    if task.cancelled():
        return {"job_id": job_id, "status": "cancelled"}
    if (error := task.exception()) is not None:
        return {"job_id": job_id, "status": "failed", "error": str(error)}
    return {"job_id": job_id, "status": "succeeded", "result": task.result()}


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
