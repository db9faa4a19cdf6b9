"""Tools of MCP servers, and our agents as an MCP server."""
