"""The approval: a call that needs one is executed only if the request contains a decision for it."""

from __future__ import annotations

from typing import Any

from openagents_worker.errors import OpenAgentsError, PermanentToolError, ToolError
from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall
from openagents_worker.runtime.user_code import described_in_log, tool_error, user_code, user_error_of
from openagents_worker.telemetry.logs import get_logger

__all__ = ["approval"]

log = get_logger(__name__)


async def approval(call: ToolCall, proceed: Proceed) -> Any:
    """Raises `PermanentToolError` if the call needs an approval that the request does not give."""
    if _is_needed(call) and (decision := _decision(call)) != "allow":  # no other value allows the call
        raise PermanentToolError(
            f"Tool {call.tool_id!r} requires approval; "
            + ("no decision was given" if decision is None else f"the decision is {decision!r}"),
            call.tool_id,
            hint=f'context_hints={{"approvals": {{"{call.tool_id}": "allow"}}}}',
        )
    return await proceed(call)


def _decision(call: ToolCall) -> Any:
    """The decision for this call, for its tool or for all tools; None if the request has none."""
    hints = call.run.context.run_request.context_hints.get("approvals")
    known = hints if isinstance(hints, dict) else {}
    return known.get(call.info.call_id, known.get(call.tool_id, known.get("*")))


def _is_needed(call: ToolCall) -> bool:
    plugin = call.tool.plugin
    if not hasattr(plugin, "requires_approval"):
        return call.tool.spec.approval_mode == "always"
    try:
        with user_code(tool_error(ToolError, call.tool_id)):
            return bool(plugin.requires_approval(call.params, call.context))
    except OpenAgentsError as error:  # if the check fails, approval is required
        log.warning(
            "tool.approval_gate_failed",
            run_id=call.run.context.run_id,
            tool_id=call.tool_id,
            **described_in_log(error),
            user_error=user_error_of(error),
        )
        return True
