"""The fallback of a tool: what it returns in place of a call that has failed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from openagents_worker.errors import ExecutionError, ModelRetryError, OpenAgentsError
from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall, needed_if
from openagents_worker.runtime.original.errors import as_original, translated
from openagents_worker.runtime.original.tools import unwrapped
from openagents_worker.runtime.user_code import described
from openagents_worker.telemetry.logs import get_logger

__all__ = ["fallback"]

log = get_logger(__name__)


@needed_if(lambda tool, _: getattr(tool.plugin, "fallback", None) is not None)
def fallback(call: ToolCall, proceed: Proceed) -> Awaitable[Any]:
    """Asks `fallback(error, params, context)` of the tool, if it has one, for a result after an exception.

    None means that there is none: then the exception is raised. Not asked after an error of the run, such as
    a budget, and not after a `ModelRetryError`, which asks the model for other arguments.
    """
    ask = getattr(call.tool.plugin, "fallback", None)
    return proceed(call) if ask is None else _with_fallback(call, proceed, ask)


async def _with_fallback(call: ToolCall, proceed: Proceed, ask: Callable[..., Awaitable[Any]]) -> Any:
    try:
        return await proceed(call)
    except Exception as error:
        coded = error if isinstance(error, OpenAgentsError) else translated(error)
        if isinstance(coded, ExecutionError | ModelRetryError):
            raise
        shown = as_original(error) if isinstance(error, OpenAgentsError) else error
        result = await ask(shown, call.params, call.context)
        if result is None:
            raise
        log.info(
            "tool.fallback_used",
            run_id=call.run.context.run_id,
            tool_id=call.tool_id,
            call_id=call.info.call_id,
            error=described(error),
        )
        return unwrapped(result, call.tool_id)
