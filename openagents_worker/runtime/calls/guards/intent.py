"""The intent: what a call with effects leaves behind before it begins, and what an interrupted one means."""

from __future__ import annotations

import asyncio
from typing import Any, assert_never

from openagents_worker.errors import OpenAgentsError, OutcomeUnknown, ToolError, error_from_wire
from openagents_worker.models import WaitKind
from openagents_worker.runtime.calls.tool_call import Proceed, RecordedOutcome, ToolCall
from openagents_worker.runtime.effects import Effect, Resolution, ResolutionAction
from openagents_worker.runtime.latch import RunLatched
from openagents_worker.runtime.user_code import described_in_log, tool_error, user_code, user_error_of
from openagents_worker.store.facts import Fact, FactKind
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.base import Reconciled

__all__ = ["intent"]

log = get_logger(__name__)

RECONCILE_TIMEOUT_MS = 30_000  # for a tool without a timeout of its own


async def intent(call: ToolCall, proceed: Proceed) -> Any:
    """Stores that the call begins. A call that an earlier attempt has begun is made only if that is allowed.

    Calls that may be repeated pass unchanged. Raises `OutcomeUnknown`, or suspends the run until somebody
    decides.
    """
    effect: Effect | None = call.info.effect
    if effect is None:
        return await proceed(call)
    is_allowed = effect.interrupted is None
    while True:
        if not is_allowed and (known := await _known_outcome(call, effect)) is not None:
            return known.value
        if await effect.write_intent(call.info, call.params):
            break
        is_allowed = False  # somebody has decided about the call meanwhile
    try:
        return await proceed(call)
    except RunLatched:
        if not call.has_begun:
            effect.report_not_begun(call.info)
        raise


class _Known:
    """The outcome of an interrupted call."""

    def __init__(self, value: Any) -> None:
        self.value = value


async def _known_outcome(call: ToolCall, effect: Effect) -> _Known | None:
    """The outcome of an interrupted call; None if it is allowed to make the call again."""
    resolution = effect.resolution
    if resolution is None:
        return await _outcome_without_resolution(call, effect)
    match resolution.action:
        case ResolutionAction.RERUN:
            return None
        case ResolutionAction.SKIP:
            return _Known(resolution.result)
        case ResolutionAction.FAIL:
            raise _unknown(call, f"{resolution.by} decided that the run fails")
        case ResolutionAction.OUTCOME:
            assert resolution.record is not None
            call.has_begun = True  # an error in it is not retried
            if "error" in resolution.record.outcome:
                raise error_from_wire(resolution.record.outcome["error"])
            return _Known(RecordedOutcome(resolution.record))
        case _:
            assert_never(resolution.action)


async def _outcome_without_resolution(call: ToolCall, effect: Effect) -> _Known | None:
    """Ask the tool whether the call had its effect. If it does not know, `on_interrupted` decides."""
    reconciled = await _reconciled(call)
    if reconciled.state == "done":
        return _Known(reconciled.result)
    if reconciled.state == "not_done":
        return None
    match call.tool.policy.on_interrupted:
        case "rerun":
            return None
        case "fail" if effect.began_in_life == call.run.context.recorder.life:
            raise _unknown(call, "on_interrupted of the tool is fail")
        case "ask" | "fail":  # somebody has resumed the failed run
            effect.resolution = await _decided(call, effect)
            return await _known_outcome(call, effect)
        case _:
            assert_never(call.tool.policy.on_interrupted)


async def _decided(call: ToolCall, effect: Effect) -> Resolution:
    """Wait until somebody decides about the call. The run holds no slot meanwhile."""
    recorder, info = call.run.context.recorder, call.info
    assert effect.interrupted is not None
    begun_as = effect.interrupted.call
    if recorder.waits.facts.stored_wait(info.call_id) is None:  # an earlier attempt has not asked yet
        call.run.writer.emit("run.outcome_unknown", {"tool_id": call.tool_id, "call_id": begun_as})
    name = Fact(FactKind.RESOLUTION, begun_as, "").name
    fact = await recorder.waits.until(info, WaitKind.OUTCOME, name=call.tool_id, fact=name)
    assert fact is not None, "the wait has no time-out"
    return Resolution.of(fact.value(run_id=recorder.run_id))


async def _reconciled(call: ToolCall) -> Reconciled:
    """The answer of the tool's `reconcile`. An error, a timeout or any other value is unknown."""
    reconcile = getattr(call.tool.plugin, "reconcile", None)
    if reconcile is None:
        return Reconciled.unknown()
    try:
        with user_code(tool_error(ToolError, call.tool_id)):
            async with asyncio.timeout((call.tool.timeout_ms or RECONCILE_TIMEOUT_MS) / 1000):
                answer = await reconcile(call.params, call.info.idempotency_key, call.context)
    except OpenAgentsError as error:
        log.warning(
            "tool.not_reconciled",
            run_id=call.run.context.run_id,
            tool_id=call.tool_id,
            call_id=call.info.call_id,
            **described_in_log(error),
            user_error=user_error_of(error),
        )
        return Reconciled.unknown()
    return answer if isinstance(answer, Reconciled) else Reconciled.unknown()


def _unknown(call: ToolCall, why: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"the call of {call.tool_id!r} was interrupted before its outcome was stored, so its effect may have "
        f"happened; {why}",
        tool_id=call.tool_id,
        call_id=call.info.call_id,
        hint="check the system behind the tool; then resume the run and resolve the call",
    )
