"""MCP: the tools of servers that speak the Model Context Protocol. Only `sdk` imports the official SDK."""
