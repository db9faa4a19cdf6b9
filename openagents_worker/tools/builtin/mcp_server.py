"""The tools of an MCP server: `mcp`. The classes are in `tools.mcp`."""

from openagents_worker.tools.mcp.toolset import McpToolset

__all__ = ["McpToolset"]
