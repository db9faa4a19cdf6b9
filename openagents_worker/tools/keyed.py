"""Tools of services with an API key: the only place that finds the key for a call of a tool."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import ClassVar

from openagents_worker.errors import LLMConnectionError, OpenAgentsError, ToolAuthError, ToolUnavailableError
from openagents_worker.secret_forms import remember_secret_for_a_while
from openagents_worker.tools.base import ToolContext
from openagents_worker.tools.typed import TypedTool

__all__ = ["KeyedTool"]


class KeyedTool(TypedTool):
    """Base of tools whose service wants a key: that of an environment variable, read for each call.

    Without the variable, a worker asks the function of `register_api_keys`, with the name of the service as
    provider. The key is in no result, event or error.
    """

    service: ClassVar[str]

    class Config(TypedTool.Config):
        api_key_env: str

    resolve_key: Callable[[str, str | None], Awaitable[str | None]] | None = None
    """(service, tenant) -> key, for a key that is not in the environment. A worker sets it."""

    async def api_key(self, context: ToolContext | None) -> str:
        """The key for this call. Raises `ToolAuthError`, or `ToolUnavailableError` if its source is down."""
        variable: str = self.cfg.api_key_env
        key = os.environ.get(variable) or await self._resolved(context)
        if not key:
            raise ToolAuthError(
                f"there is no API key for {self.service}",
                self.tool_name,
                hint=f"set the environment variable {variable} of the worker, or use register_api_keys",
            )
        remember_secret_for_a_while(key)
        if not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ToolAuthError(
                f"the API key for {self.service} is not allowed in an HTTP header",
                self.tool_name,
                hint="the usual reason is a newline at its end",
            )
        return key

    async def _resolved(self, context: ToolContext | None) -> str | None:
        if self.resolve_key is None:
            return None
        tenant = getattr(getattr(context, "run_request", None), "tenant", None)
        try:
            return await self.resolve_key(self.service, tenant)
        except LLMConnectionError as error:
            raise ToolUnavailableError(str(error), self.tool_name) from error
        except OpenAgentsError as error:
            raise ToolAuthError(str(error), self.tool_name, hint=error.hint) from error
