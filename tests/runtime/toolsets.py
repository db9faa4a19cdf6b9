"""A toolset whose list of tools changes, a tool whose schema changes, and patterns that use them."""

from __future__ import annotations

from typing import Any, ClassVar

from openagents_worker.tools import ToolPlugin
from openagents_worker.tools.base import ToolExecutionSpec
from tests.runtime.plugins import FAILURES, LOG


class Priced(ToolPlugin):
    """A tool as a toolset lists it. Its schema has one argument."""

    def __init__(self, name: str, argument: str = "who", **spec: Any) -> None:
        super().__init__()
        self.name, self.description = name, f"{name} by {argument}."
        self.durable_idempotent = spec.pop("durable_idempotent", True)
        self._schema = {"type": "object", "properties": {argument: {}}, "required": [argument]}
        self._schema |= spec.pop("schema", {})
        self._spec = ToolExecutionSpec(**spec)

    def schema(self) -> dict[str, Any]:
        return self._schema

    def execution_spec(self) -> ToolExecutionSpec:
        return self._spec


class Shop:
    """A toolset with the tools of `LISTED`. Its calls fail as `FAILURES` says."""

    LISTED: ClassVar[list[Priced]] = []

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    async def open(self) -> None:
        LOG.append(("open",))
        if FAILURES.get("open"):
            raise FAILURES["open"].pop(0)

    async def list(self, context: Any) -> list[Priced]:
        LOG.append(("list", context.agent_id))
        return self.LISTED

    async def call(self, tool_id: str, params: dict[str, Any], context: Any) -> Any:
        LOG.append(("call", tool_id, params, context.idempotency_key))
        if FAILURES.get(tool_id):
            raise FAILURES[tool_id].pop(0)
        return f"{tool_id} of {params}"

    async def close(self) -> None:
        LOG.append(("close",))
        if FAILURES.get("close"):
            raise FAILURES["close"].pop(0)


class Changing(ToolPlugin):
    """A single tool whose description depends on the version of the program that a worker runs."""

    name = "changing"
    version: ClassVar[int] = 1

    def describe(self) -> dict[str, Any]:
        return {"name": "changing", "description": f"v{self.version}", "parameters": {"type": "object"}}

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        if "version" not in params and FAILURES.get("changing"):
            raise FAILURES["changing"].pop(0)
        return "fine"


class Uses:
    """Calls its tools in the configured order, and returns what the model would see of them."""

    context: Any

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.tools: list[str] = (config or {})["tools"]

    async def execute(self) -> Any:
        results = [await self.context.tools[name].invoke({"who": "a"}) for name in self.tools]
        described = {name: tool.describe()["description"] for name, tool in self.context.tools.items()}
        return {"results": results, "tools": described}


class Diverges(Uses):
    """Asks for something else in each version of the program."""

    async def execute(self) -> Any:
        await self.context.tools["changing"].invoke({"version": Changing.version})
        await self.context.tools["changing"].invoke({"who": "a"})
        return "done"
