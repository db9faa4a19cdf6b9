"""The intent: what a call with effects leaves behind before it begins."""

from __future__ import annotations

from typing import Any

from openagents_worker.errors import ToolError
from openagents_worker.runtime.calls.guards.announcement import announce
from openagents_worker.runtime.calls.interrupted import RECONCILE_TIMEOUT_MS, CallWithEffect, KnownOutcome
from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall, needed_if
from openagents_worker.runtime.effects import Effect
from openagents_worker.runtime.latch import RunLatched
from openagents_worker.runtime.user_code import tool_error

__all__ = ["begin_effect", "intent"]


@needed_if(lambda tool, _: not tool.may_repeat and not tool.is_background)
async def intent(call: ToolCall, proceed: Proceed) -> Any:
    """Stores that the call begins. A call that an earlier attempt has begun is made only if that is allowed.

    Calls that may be repeated pass unchanged, and so do those with a job: only its start has an effect
    (`calls.jobs`). Raises `OutcomeUnknown`, or suspends the run until somebody decides.
    """
    effect: Effect | None = call.info.effect
    if effect is None:
        return await proceed(call)
    if (known := await begin_effect(call)) is not None:
        call.has_begun = True  # an error in it is not retried
        return known.outcome()
    try:
        return await proceed(call)
    except RunLatched:
        if not call.has_begun:
            effect.report_not_begun(call.info)
        raise
    except ToolError as error:
        if error.retryable and error.was_executed is not True:
            # The next attempt makes the call: at once if it was not executed, otherwise as `on_interrupted`
            # of the tool says.
            call.has_begun = False
            effect.failed(call.info, may_have_run=error.was_executed is None)
        raise


async def begin_effect(call: ToolCall) -> KnownOutcome | None:
    """Store that the effect of a call begins. If an earlier attempt has begun it: its outcome, once known."""
    effect: Effect | None = call.info.effect
    if effect is None:
        return None
    known = await _with_effect(call, effect).begin(call.params)
    if known is None and call.run.context.recorder.announced.was_interrupted(call.info):
        announce(call)
    return known


def _with_effect(call: ToolCall, effect: Effect) -> CallWithEffect:
    reconcile = getattr(call.tool.plugin, "reconcile", None)

    async def ask_tool() -> Any:
        assert reconcile is not None
        return await reconcile(call.params, call.info.idempotency_key, call.context)

    return CallWithEffect(
        what=f"the call of {call.tool_id!r}",
        info=call.info,
        effect=effect,
        recorder=call.run.context.recorder,
        emit=call.run.writer.emit,
        on_interrupted=call.tool.policy.on_interrupted,
        reconcile=ask_tool if reconcile is not None else None,
        reconcile_timeout_ms=call.tool.timeout_ms or RECONCILE_TIMEOUT_MS,
        error_of=tool_error(ToolError, call.tool_id),
    )
