"""The check of the arguments: by the schema of the tool, then by the tool itself."""

from __future__ import annotations

import os
from typing import Any

from openagents_worker.errors import CheckLimitExceeded, ToolValidationError
from openagents_worker.jsontext import dumps
from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall
from openagents_worker.tools.policies import PolicyRequest, check_policies, policies_of_call

__all__ = ["arguments", "check_arguments"]

SHOWN_SCHEMA_CHARS = 500  # of the schema, in the hint for the model


async def arguments(call: ToolCall, proceed: Proceed) -> Any:
    """Check the arguments of the call. Raises `ToolValidationError` with a text for the model."""
    await check_arguments(call)
    if not call.tool.rules.policies:
        return await proceed(call)
    token = policies_of_call.set((call.tool.rules.policies, _policy_request(call)))
    try:
        return await proceed(call)
    finally:
        policies_of_call.reset(token)


async def check_arguments(call: ToolCall) -> None:
    """Raises `ToolValidationError` if the arguments do not match the schema, or if the tool refuses them, and
    `PermanentToolError` if a policy of the agent's executor does not allow the call."""
    problem = await _schema_problem(call) or _problem_of_tool(call)
    if problem is not None:
        shown = dumps(call.tool.schema)[:SHOWN_SCHEMA_CHARS]
        raise ToolValidationError(problem, call.tool_id, hint=f"the parameters are {shown}")
    if call.tool.rules.policies:
        await check_policies(call.tool.rules.policies, _policy_request(call))


def _policy_request(call: ToolCall) -> PolicyRequest:
    tool = call.tool
    parameters = tool.schema.get("properties")
    known = parameters if isinstance(parameters, dict) else {}
    resolve = getattr(tool.plugin, "resolved", os.path.abspath)  # the file tools know what their paths mean
    return PolicyRequest(tool.tool_id, tool.spec, known, call.params, resolve)


async def _schema_problem(call: ToolCall) -> str | None:
    try:
        return await call.run.checks.mistakes(call.tool.checked_schema, call.params, "argument")
    except CheckLimitExceeded as error:  # the model may try arguments that are cheaper to check
        raise ToolValidationError(error.message, call.tool_id, hint=error.hint) from error


def _problem_of_tool(call: ToolCall) -> str | None:
    if not hasattr(call.tool.plugin, "validate_params"):
        return None
    is_valid, message = call.tool.plugin.validate_params(call.params)
    return None if is_valid else message or "refused by the tool"
