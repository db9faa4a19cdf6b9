"""The contract of a toolset: a source of tools that is opened, lists its tools, calls them, and is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

from openagents_worker.tools.base import Reconciled, ToolPlugin
from openagents_worker.tools.jobs import JobHandle, has_jobs

__all__ = ["JobsOfToolset", "OpenedAtUse", "SingleTool", "Toolset", "is_toolset"]

METHODS = ("open", "list", "call", "close")


class Toolset(Protocol):
    """Several tools with one source, for example a server. An agent names it like a tool, by its class.

    One instance serves one attempt of a run. The first attempt lists the tools, and the list is recorded:
    later attempts offer the same ones, whatever the source offers then. A tool that the source no longer has
    fails its calls. `open` is called before the first `list` or `call`, and perhaps in another task than
    `close`.
    """

    async def open(self) -> None: ...

    async def list(self, context: Any) -> Sequence[ToolPlugin]:
        """The tools for a run: their names, descriptions, schemas, and how they are executed."""
        ...

    async def call(self, tool_id: str, params: dict[str, Any], context: Any) -> Any:
        """Call a tool that was listed; `context` is a `ToolContext`. The result must be JSON.

        Raise a `ToolError` to report a failure to the model.
        """
        ...

    async def close(self) -> None:
        """Release the source. Called at the end of the attempt."""
        ...

    # Further methods are optional. Those of `JobsOfToolset` make the calls of listed tools whose execution
    # spec has `background=True`. `async reconcile(tool_id, params, idempotency_key, context)` returns a
    # `Reconciled` for an interrupted call of a listed tool, as `ToolPlugin.reconcile` does. `recorded(tools)`
    # gets the tools with which the run began, in each attempt before the first call; they have what a listed
    # tool had as `source`, a JSON object. `async warm_up(context)` is called in each attempt before the
    # pattern begins.


class SingleTool:
    """A tool as a toolset of one."""

    def __init__(self, tool: Any) -> None:
        self.tool = tool

    async def open(self) -> None: ...

    async def list(self, context: Any) -> Sequence[Any]:
        return [self.tool]

    async def call(self, tool_id: str, params: dict[str, Any], context: Any) -> Any:
        return await self.tool.invoke(params, context)

    async def close(self) -> None:
        if hasattr(self.tool, "close"):
            await self.tool.close()


class OpenedAtUse:
    """A toolset that is opened before its first use, and closed if it was opened."""

    def __init__(self, toolset: Toolset) -> None:
        self._toolset = toolset
        self._is_open = False
        self._opening = asyncio.Lock()

    async def open(self) -> None:
        async with self._opening:
            if not self._is_open:
                await self._toolset.open()
                self._is_open = True

    async def list(self, context: Any) -> Sequence[Any]:
        await self.open()
        return await self._toolset.list(context)

    async def call(self, tool_id: str, params: dict[str, Any], context: Any) -> Any:
        await self.open()
        return await self._toolset.call(tool_id, params, context)

    async def reconcile(
        self, tool_id: str, params: dict[str, Any], idempotency_key: str, context: Any
    ) -> Any:
        """What the toolset says about an interrupted call. Unknown if it has no such method."""
        if (reconcile := getattr(self._toolset, "reconcile", None)) is None:
            return Reconciled.unknown()
        await self.open()
        return await reconcile(tool_id, params, idempotency_key, context)

    @property
    def has_jobs(self) -> bool:
        """Whether the toolset can start jobs for its tools."""
        return has_jobs(self._toolset)

    async def jobs(self) -> JobsOfToolset:
        """The toolset, opened, if it has jobs."""
        await self.open()
        toolset: Any = self._toolset
        return toolset  # type: ignore[no-any-return]  # checked by `has_jobs`

    async def close(self) -> None:
        if self._is_open:
            self._is_open = False
            await self._toolset.close()

    def recorded(self, tools: Sequence[Any]) -> None:
        if (take := getattr(self._toolset, "recorded", None)) is not None:
            take(tools)

    async def warm_up(self, context: Any) -> None:
        if (warm_up := getattr(self._toolset, "warm_up", None)) is not None:
            await self.open()
            await warm_up(context)


class JobsOfToolset(Protocol):
    """The methods of a toolset whose tools start jobs. `tool_id` is the name of the listed tool."""

    async def invoke_background(self, tool_id: str, params: dict[str, Any], context: Any) -> JobHandle: ...

    async def poll_job(self, tool_id: str, handle: JobHandle, context: Any) -> Any: ...

    async def cancel_job(self, tool_id: str, handle: JobHandle, context: Any) -> bool: ...


def is_toolset(plugin: Any) -> bool:
    """Whether an object, or the instances of a class, can be used as a toolset."""
    return all(callable(getattr(plugin, method, None)) for method in METHODS)
