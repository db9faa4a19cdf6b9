"""Calls the built-in tools of the original SDK, in an environment that has its package and not our library.

Reads a list of `[type, config, arguments]` from stdin, and prints a list of results: `{"result": …}`, or
`{"error": …}` for an exception. `TAVILY_URL` is a server in the place of the service.
"""

import asyncio
import json
import os
import sys
from typing import Any

from openagents.plugins.builtin.tool import tavily_search
from openagents.plugins.registry import get_builtin_plugin_class, list_builtin_plugins

tavily_search._API_URL = os.environ["TAVILY_URL"]


async def outcome(kind: str, config: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"result": await get_builtin_plugin_class("tool", kind)(config=config).invoke(arguments, None)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


async def main() -> None:
    outcomes = [await outcome(*call) for call in json.load(sys.stdin)]
    print(json.dumps({"types": list_builtin_plugins("tool"), "outcomes": outcomes}))


asyncio.run(main())
