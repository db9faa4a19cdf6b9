"""A program that calls tools of MCP servers with the toolset, and prints what came of it as JSON.

It runs where our wheel and some version of the SDK are installed. Its argument is a list of servers, each
with the config of the tool `mcp` and with calls. An argument `["first", 3, "uri"]` is the field `uri` of the
first entry in the list that call 3 has returned.
"""

from __future__ import annotations

__all__ = ["CLIENT", "PROGRAM"]

PROGRAM = """
import asyncio, json, sys
from types import SimpleNamespace

from openagents_worker.errors import ToolError
from openagents_worker.tools.mcp.connections import McpServers
from openagents_worker.tools.mcp.sdk import load_sdk
from openagents_worker.tools.mcp.toolset import McpToolset


async def emit(name, **payload):
    pass


def argument(value, results):
    if isinstance(value, list) and value[:1] == ["first"]:
        return results[value[1]][0][value[2]]
    return value


async def used(asked, servers):
    toolset = McpToolset(asked["config"])
    toolset.attach("srv", servers, None)
    context = SimpleNamespace(emit=emit, session_id="s", run_request=SimpleNamespace(tenant=None))
    try:
        listed = await toolset.list(context)
        toolset.recorded(listed)
        results = []
        for number, (name, arguments) in enumerate(asked["calls"]):
            context.idempotency_key = f"r:u:{number}"
            arguments = {key: argument(value, results) for key, value in arguments.items()}
            try:
                results.append(await toolset.call(name, arguments, context))
            except ToolError as error:
                results.append({"code": error.code, "message": str(error)})
        return {"tools": [tool.name for tool in listed], "results": results}
    finally:
        await toolset.close()


async def main():
    servers = McpServers()
    try:
        found = [await used(asked, servers) for asked in json.loads(sys.argv[1])]
    finally:
        await servers.close()
    left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    print(json.dumps({"sdk": load_sdk().version, "found": found, "left": left}))

asyncio.run(main())
"""

CLIENT = """
import asyncio, json, os, sys
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client


async def main():
    told = []

    async def report(progress, total, message):
        told.append(message)

    server = StdioServerParameters(command=sys.argv[1], args=sys.argv[2:], env=dict(os.environ))
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        tools = [tool.name for tool in (await session.list_tools()).tools]
        result = await session.call_tool("greeter", {"input": "hi"}, progress_callback=report)
    print(json.dumps({"tools": tools, "result": result.model_dump(by_alias=True, mode="json"), "told": told}))

asyncio.run(main())
"""
