"""What the package's decorators have registered: functions with its `@tool`, and plugins by name."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

from openagents_worker.errors import PluginConfigError
from openagents_worker.runtime.original.package import loaded
from openagents_worker.tools.base import ToolContext, ToolPlugin

__all__ = ["ParamsTool", "is_decorated_tool", "registered"]

REGISTRIES = {
    "tool": "_TOOL_REGISTRY",
    "pattern": "_PATTERN_REGISTRY",
    "memory": "_MEMORY_REGISTRY",
    "context_assembler": "_CONTEXT_ASSEMBLER_REGISTRY",
}
PARAMETERS = ("params", "context")


def registered(kind: str, name: str) -> Any:
    """What a decorator of the package has registered under a name, in an imported module; None if nothing."""
    registry = loaded("decorators", REGISTRIES[kind]) if kind in REGISTRIES else None
    return registry.get(name) if isinstance(registry, dict) else None


def is_decorated_tool(code: Any) -> bool:
    """Whether this is a function with the package's `@tool`."""
    return inspect.isfunction(code) and getattr(code, "_is_tool", False) is True


class ParamsTool(ToolPlugin):
    """A function `(params, context)` with the package's `@tool`.

    Its schema allows any arguments: the function does not say which ones it takes. A function that is not
    async runs in a thread.
    """

    run_sync: Callable[..., Awaitable[Any]]
    """Runs `(function, **arguments)` off the event loop. A worker sets its own threads here."""

    def __init__(self, function: Callable[..., Any], config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.run_sync = asyncio.to_thread
        self._function = function
        self.name = str(getattr(function, "_tool_name", function.__name__))
        given = str(getattr(function, "_tool_description", ""))
        self.description = given or " ".join((inspect.getdoc(function) or "").split("\n\n", 1)[0].split())
        if not self.description:
            raise PluginConfigError(
                f"the tool {self.name!r} has no description", hint="write a docstring: the model gets it"
            )

    @staticmethod
    def takes(function: Callable[..., Any]) -> bool:
        """Whether a function has exactly the parameters of a tool of the original SDK."""
        return tuple(inspect.signature(function).parameters) == PARAMETERS

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}

    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(params, context)
        result = await self.run_sync(self._function, params=params, context=context)
        return await result if inspect.isawaitable(result) else result
