"""Bearer tokens of MCP servers: the only place that finds them. They are in no message, event or record."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

from openagents_worker.errors import LLMConnectionError, OpenAgentsError, ToolAuthError, ToolUnavailableError
from openagents_worker.secret_forms import remember_secret_for_a_while
from openagents_worker.tools.mcp.options import ServerOptions

__all__ = ["ResolveKey", "bearer_token"]

ResolveKey = Callable[[str, str | None], Awaitable[str | None]]
"""(service, tenant) -> token."""


async def bearer_token(
    server: ServerOptions, tool_id: str, context: Any, resolve: ResolveKey | None
) -> str | None:
    """The token for a call now; None if the server needs none.

    Raises `ToolAuthError`, or `ToolUnavailableError` if its source does not answer.
    """
    if server.bearer_token_env is not None:
        token = os.environ.get(server.bearer_token_env)
        hint = f"set the environment variable {server.bearer_token_env} of the worker"
    elif server.bearer_token_service is not None:
        token = await _resolved(server.bearer_token_service, tool_id, context, resolve)
        hint = "register_api_keys takes a function that returns it"
    else:
        return None
    if not token:
        raise ToolAuthError(f"there is no token for the MCP server {server.shown}", tool_id, hint=hint)
    remember_secret_for_a_while(token)
    if not (token.isascii() and token.isprintable() and token == token.strip()):
        raise ToolAuthError(
            f"the token for the MCP server {server.shown} is not allowed in an HTTP header",
            tool_id,
            hint="the usual reason is a newline at its end",
        )
    return token


async def _resolved(service: str, tool_id: str, context: Any, resolve: ResolveKey | None) -> str | None:
    if resolve is None:
        return None
    tenant = getattr(getattr(context, "run_request", None), "tenant", None)
    try:
        return await resolve(service, tenant)
    except LLMConnectionError as error:
        unavailable = ToolUnavailableError(str(error), tool_id)
        unavailable.was_executed = False
        raise unavailable from error
    except OpenAgentsError as error:
        raise ToolAuthError(str(error), tool_id, hint=error.hint) from error
