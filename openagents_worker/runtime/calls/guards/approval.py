"""The approval: a call that needs one is executed only after somebody has approved it."""

from __future__ import annotations

from typing import Any

from openagents_worker.errors import ApprovalTimeout, OpenAgentsError, PermanentToolError, ToolError
from openagents_worker.models import Decision, WaitKind
from openagents_worker.runtime.approvals import Asked, decision_of
from openagents_worker.runtime.calls.guards.arguments import check_arguments
from openagents_worker.runtime.calls.tool_call import Proceed, ToolCall
from openagents_worker.runtime.user_code import described_in_log, tool_error, user_code, user_error_of
from openagents_worker.store.facts import Fact, FactKind
from openagents_worker.telemetry.logs import get_logger

__all__ = ["approval"]

log = get_logger(__name__)


async def approval(call: ToolCall, proceed: Proceed) -> Any:
    """Waits for a decision about a call that needs an approval; the run holds no slot meanwhile.

    A decision in the request (`context_hints`) counts first. A call that somebody was asked about needs the
    decision, also if the tool now says that it needs none. Raises `PermanentToolError` for a call that was
    denied, as an error for the model, and `ApprovalTimeout` to end the run.
    """
    gate = _gate(call)
    if gate is False and not _was_asked(call):
        return await proceed(call)
    given = _given_by_request(call)
    if given == "allow":  # no other value allows the call
        return await proceed(call)
    if given is not None or gate is None or not call.info.may_suspend:
        raise _refused(call, "no decision was given" if given is None else f"the decision is {given!r}")
    call.decision = decision = await _decided(call)
    return await _follow(decision, call, proceed)


def _was_asked(call: ToolCall) -> bool:
    """Whether an earlier attempt has asked about the call, or an earlier life has its decision."""
    recorder, call_id = call.run.context.recorder, call.info.call_id
    decision = Fact(FactKind.APPROVAL, call_id, "").name
    return recorder.approvals.asked(call_id) is not None or recorder.waits.facts.holds(decision)


def _gate(call: ToolCall) -> bool | None:
    """Whether the call needs an approval. None: that cannot be said, so the call is not executed."""
    policy, plugin = call.tool.policy, call.tool.plugin
    if policy.approval is not None:
        return policy.approval == "always"
    if not hasattr(plugin, "requires_approval"):
        return call.tool.spec.approval_mode == "always"
    try:
        with user_code(tool_error(ToolError, call.tool_id)):
            return bool(plugin.requires_approval(call.params, call.context))
    except OpenAgentsError as error:
        log.warning(
            "tool.approval_gate_failed",
            run_id=call.run.context.run_id,
            tool_id=call.tool_id,
            **described_in_log(error),
            user_error=user_error_of(error),
        )
        return None


def _given_by_request(call: ToolCall) -> Any:
    """The decision for this call, for its tool or for all tools; None if the request has none."""
    hints = call.run.context.run_request.context_hints.get("approvals")
    known = hints if isinstance(hints, dict) else {}
    return known.get(call.info.call_id, known.get(call.tool_id, known.get("*")))


async def _decided(call: ToolCall) -> Decision:
    """Ask about the call, unless that was done, and wait for the decision."""
    recorder, info = call.run.context.recorder, call.info
    name = Fact(FactKind.APPROVAL, info.call_id, "").name
    asked = recorder.approvals.asked(info.call_id)
    recorder.replaces(info.call_id, Fact(FactKind.ASK, info.call_id, "").name)
    if asked is None:
        asked = _question(call, recorder.waits.clock.now_ms())
        if not recorder.waits.facts.holds(name):  # else an earlier life of the run has asked
            await recorder.approvals.ask(info, asked)
    timeout_ms = max(0, asked.expires_ms - recorder.waits.clock.now_ms()) if asked.expires_ms else None
    fact = await recorder.waits.until(
        info, WaitKind.APPROVAL, name=call.tool_id, fact=name, timeout_ms=timeout_ms, needs_all=True
    )
    if fact is not None:
        return decision_of(fact.text, info.call_id, recorder.run_id)
    recorder.replaces(info.call_id, name)
    return await recorder.approvals.decide_by_timeout(info, asked)


def _question(call: ToolCall, now_ms: int) -> Asked:
    policy = call.tool.policy
    timeout_ms = policy.approval_timeout_ms
    return Asked(
        tool_id=call.tool_id,
        arguments=call.run.writer.shown(call.params),
        reason=call.tool.description.get("description") or None,
        requested_ms=now_ms,
        expires_ms=0 if timeout_ms is None else now_ms + timeout_ms,
        default_action=policy.approval_default,
    )


async def _follow(decision: Decision, call: ToolCall, proceed: Proceed) -> Any:
    """Execute the call as it was decided. Only `approve` executes it."""
    if decision.action == "approve":
        if decision.arguments is None:
            return await proceed(call)
        call.params = dict(decision.arguments)
        await check_arguments(call)
        return await proceed(call)
    if decision.action == "fail":
        raise ApprovalTimeout(
            f"nobody has decided in time whether the tool {call.tool_id!r} may be called",
            tool_id=call.tool_id,
            hint="set approval_timeout_ms and approval_default of the tool in the agents file",
        )
    note = f": {decision.note}" if decision.note else ""
    raise PermanentToolError(f"{decision.by} denied the call of {call.tool_id!r}{note}", call.tool_id)


def _refused(call: ToolCall, why: str) -> PermanentToolError:
    return PermanentToolError(
        f"Tool {call.tool_id!r} requires approval; {why}",
        call.tool_id,
        hint=f'context_hints={{"approvals": {{"{call.tool_id}": "allow"}}}}',
    )
