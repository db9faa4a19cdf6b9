"""Agents as an MCP server over stdio (`openagents-worker mcp`). It needs no SDK."""
