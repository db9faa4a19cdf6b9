"""Lists of a server: the only place that reads all pages of its tools, resources or prompts, and bounds them.

A server may have thousands of tools, repeat a page for ever, or add an image to each description.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.mcp.connection import McpConnection
from openagents_worker.tools.mcp.options import MAX_SERVER_TOOLS
from openagents_worker.tools.mcp.streams import SCHEMA

__all__ = ["MAX_LISTED", "MAX_LIST_BYTES", "Found", "all_pages", "all_tools"]

log = get_logger(__name__)

MAX_LISTED = 1_000  # resources or prompts; they are shown to a model
MAX_LIST_BYTES = 4 * 1024 * 1024  # as JSON: of all pages of a list

Found = list[dict[str, Any]]
"""Tools, resources or prompts as a server describes them."""


async def all_tools(connection: McpConnection) -> Found:
    """The tools of a server, at most `MAX_SERVER_TOOLS`, with the fields that are used."""
    found = await all_pages(connection, "tools/list", "tools", MAX_SERVER_TOOLS)
    return [_with_schema(tool) for tool in found]


async def all_pages(connection: McpConnection, method: str, key: str, most: int) -> Found:
    """The elements of all pages of a list.

    A list that is too long is cut, and so is one of which the server sends a page again. The log says so.
    """
    found: Found = []
    size = 0
    cursors: list[str] = []
    while True:
        page = await connection.request(method, **({"cursor": cursors[-1]} if cursors else {}))
        items = page.get(key)
        for item in items if isinstance(items, list) else []:
            if not isinstance(item, dict):
                continue
            size += _size_of(item)
            if size > MAX_LIST_BYTES or len(found) == most:
                return _cut(connection, method, found)
            found.append(item)
        cursor = page.get("nextCursor")
        if not isinstance(cursor, str) or not cursor:
            return found
        size += len(cursor)
        if cursor in cursors or size > MAX_LIST_BYTES or len(cursors) >= most:
            return _cut(connection, method, found)
        cursors.append(cursor)


def _with_schema(tool: dict[str, Any]) -> dict[str, Any]:
    meta = tool.get("_meta")
    schema = meta.get(SCHEMA) if isinstance(meta, dict) else None
    if schema is None or (isinstance(schema, dict) and "type" not in schema):
        schema = {"type": "object", **(schema or {})}  # without a type, providers refuse it
    return {**{name: value for name, value in tool.items() if name != "_meta"}, "inputSchema": schema}


def _size_of(element: Mapping[str, Any]) -> int:
    return len(to_json(element, inf_nan_mode="constants"))


def _cut(connection: McpConnection, method: str, found: Found) -> Found:
    log.warning("mcp.list_cut", server=connection.shown, method=method, kept=len(found))
    return found
