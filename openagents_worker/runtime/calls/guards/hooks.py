"""The hooks of a tool: `before_invoke` and `after_invoke`."""

from __future__ import annotations

from typing import Any

from openagents_worker.errors import OpenAgentsError, ToolError
from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall
from openagents_worker.runtime.latch import RunLatched
from openagents_worker.runtime.user_code import described_in_log, tool_error, user_code, user_error_of
from openagents_worker.telemetry.logs import get_logger

__all__ = ["hooks"]

log = get_logger(__name__)


async def hooks(call: ToolCall, proceed: Proceed) -> Any:
    """Calls the hooks around the tool. From here on the call may have had side effects."""
    call.has_begun = True
    result: Any = None
    raised: BaseException | None = None
    try:
        if not call.goes_on:
            await _call_hook(call, "before_invoke")
        result = await proceed(call)
        return result
    except BaseException as error:
        raised = error
        raise
    finally:
        if raised is None or not isinstance(raised, RunLatched | GeneratorExit):
            await _after_invoke(call, result, raised)


async def _after_invoke(call: ToolCall, result: Any, raised: BaseException | None) -> None:
    """Call `after_invoke`. It cannot change the outcome; its errors are only logged."""
    try:
        with user_code(tool_error(ToolError, call.tool_id)):
            await _call_hook(call, "after_invoke", result, raised)
    except OpenAgentsError as error:
        log.warning(
            "tool.after_invoke_failed",
            run_id=call.run.context.run_id,
            tool_id=call.tool_id,
            **described_in_log(error),
            user_error=user_error_of(error),
        )


async def _call_hook(call: ToolCall, name: str, *more: Any) -> None:
    hook = getattr(call.tool.plugin, name, None)
    if hook is not None:
        await hook(call.params, call.context, *more)
