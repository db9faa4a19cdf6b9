"""A pattern that makes the calls of its config, and returns what the model would see of them."""

from __future__ import annotations

import asyncio
from typing import Any

from openagents_worker.errors import OpenAgentsError


class Calls:
    """Each call is `[name, arguments]`; a list of calls is made at once. An error is part of the result."""

    context: Any

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.calls: list[Any] = (config or {})["calls"]

    async def execute(self) -> Any:
        results = []
        for call in self.calls:
            if isinstance(call[0], list):
                results.append(await asyncio.gather(*map(self.made, call)))
            else:
                results.append(await self.made(call))
        described = {name: tool.describe() for name, tool in self.context.tools.items()}
        return {"results": results, "tools": described}

    async def made(self, call: list[Any]) -> Any:
        name, arguments = call
        try:
            return await self.context.call_tool(name, arguments)
        except OpenAgentsError as error:
            return {"code": error.code, "message": str(error)}


class Sleeps:
    """Waits for ten minutes, parked."""

    context: Any

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    async def execute(self) -> str:
        await self.context.sleep(600)
        return "awake"
