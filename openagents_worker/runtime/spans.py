"""Signals of a run: the only place that says what is reported of attempts and of recorded calls.

The names and the attributes follow OpenTelemetry's semantic conventions for generative AI. They contain ids
and counts, never a prompt, an answer, arguments or a result.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from openagents_worker.errors import OpenAgentsError
from openagents_worker.jsontext import loads
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import RunRequest, RunUsage
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.store.scripts import ClaimAnswer, Claimed
from openagents_worker.telemetry import signals
from openagents_worker.telemetry.signals import NO_SPAN, AttributeValue, Span

if TYPE_CHECKING:
    from openagents_worker.runtime.attempt import AttemptResult
    from openagents_worker.runtime.recorder import Outcome

__all__ = [
    "attempt_span",
    "call_span",
    "count_claim",
    "count_replayed",
    "end_attempt_span",
    "end_call_span",
]

OPERATIONS = {"model": "chat", "tool": "execute_tool"}
"""The GenAI operation of a kind of call; the other kinds have no name in the conventions."""


def attempt_span(request: RunRequest, claimed: Claimed) -> AbstractContextManager[Span]:
    """The span of one attempt. Its parent is the producer's span, also after a kill and a resume."""
    if not signals.is_enabled():
        return NO_SPAN
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.id": request.agent_id,
        "gen_ai.conversation.id": request.session_id,
        "openagents.run.id": request.run_id or "",
        "openagents.run.attempt": claimed.attempt,
        "openagents.run.life": claimed.life,
        "openagents.run.recoveries": claimed.recoveries,
    }
    # Without a producer's span, the attempts of a run still belong to one trace.
    parent = _traceparent(claimed.canvas) or signals.traceparent_of(f"{request.run_id} {claimed.uid}")
    return signals.span(f"invoke_agent {request.agent_id}", attributes, parent=parent)


def end_attempt_span(
    span: Span, request: RunRequest, result: AttemptResult, claimed: Claimed, *, began_s: float
) -> AttemptResult:
    """Set the outcome of the attempt; returns the result. `began_s` is when it began, by `time.monotonic`."""
    if not signals.is_measuring():
        return result
    agent: dict[str, AttributeValue] = {"gen_ai.agent.id": request.agent_id}
    outcome: dict[str, AttributeValue] = {**agent, "openagents.outcome": result.kind.value}
    span.set("openagents.outcome", result.kind.value)
    if result.stop_reason is not None:
        reason = result.stop_reason.value
        span.set("openagents.stop_reason", reason)
        signals.count("openagents.runs.ended", 1, {**agent, "openagents.stop_reason": reason})
        active_s = claimed.active_ms / 1000 + time.monotonic() - began_s
        signals.observe("openagents.run.active", active_s, agent)
    if result.error is not None:
        span.fail(result.error.code)
    signals.count("openagents.attempts", 1, outcome)
    return result


def count_claim(answer: ClaimAnswer) -> None:
    """Count the answer to a wake-up message."""
    if signals.is_measuring():
        signals.count("openagents.claims", 1, {"openagents.answer": answer.value.lower()})


def call_span(info: CallInfo) -> AbstractContextManager[Span]:
    """The span of a recorded call that is made, not replayed."""
    if not signals.is_enabled():
        return NO_SPAN
    operation = OPERATIONS.get(info.kind, info.kind)
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": operation,
        "openagents.run.id": info.run_id,
        "openagents.call.id": info.call_id,
    }
    if info.kind == "model":
        attributes["gen_ai.request.model"] = info.name
    elif info.kind == "tool":
        attributes |= {
            "gen_ai.tool.name": info.name,
            "gen_ai.tool.type": "function",
            "gen_ai.tool.call.id": info.call_id,
        }
    return signals.span(f"{operation} {info.name}", attributes)


def end_call_span(
    span: Span, identity: RunIdentity, info: CallInfo, outcome: Outcome, *, began_s: float
) -> Outcome:
    """Set the usage or the error of a call that was made; returns the outcome.

    `began_s` is when the call began, by the clock of the loop.
    """
    if not signals.is_measuring() or outcome.waits_for is not None:  # parked: the call is made later
        return outcome
    took_s = max(asyncio.get_running_loop().time() - began_s, 0.0)
    kind: dict[str, AttributeValue] = {"openagents.call.kind": info.kind}
    error: dict[str, AttributeValue] = {}
    if isinstance(outcome.error, OpenAgentsError):
        span.fail(outcome.error.code)
        error["error.type"] = outcome.error.code
    signals.count("openagents.calls", 1, {**kind, **error})
    signals.observe("openagents.call.duration", took_s, kind)
    if info.kind == "model":
        _end_model_call(span, identity, info, outcome.usage, took_s=took_s, error=error)
    elif info.kind == "tool":
        tool: dict[str, AttributeValue] = {"gen_ai.tool.name": info.name, **error}
        signals.observe("gen_ai.execute_tool.duration", took_s, tool)
        signals.count("openagents.tool.calls", 1, {"gen_ai.agent.id": identity.agent_id, **tool})
    return outcome


def _end_model_call(
    span: Span,
    identity: RunIdentity,
    info: CallInfo,
    usage: RunUsage,
    *,
    took_s: float,
    error: Mapping[str, AttributeValue],
) -> None:
    """Report duration, tokens and cost of a model call."""
    model: dict[str, AttributeValue] = {"gen_ai.operation.name": "chat", "gen_ai.request.model": info.name}
    signals.observe("gen_ai.client.operation.duration", took_s, {**model, **error})
    model["gen_ai.agent.id"] = identity.agent_id
    signals.count("openagents.model.calls", 1, {**model, **error})
    for direction, tokens in (("input", usage.input_tokens), ("output", usage.output_tokens)):
        if tokens or not error:
            span.set(f"gen_ai.usage.{direction}_tokens", tokens)
            signals.count("openagents.tokens", tokens, {**model, "gen_ai.token.type": direction})
    if usage.input_tokens_cached:
        span.set("gen_ai.usage.cache_read.input_tokens", usage.input_tokens_cached)
        signals.count("openagents.tokens.cached", usage.input_tokens_cached, model)
    if usage.cost_usd:
        span.set("openagents.cost_usd", usage.cost_usd)
        signals.count("openagents.cost", usage.cost_usd, model)
    if usage.ttft_ms is not None:
        signals.observe("gen_ai.client.operation.time_to_first_chunk", usage.ttft_ms / 1000, model)
    if usage.llm_retry_count:
        signals.count("openagents.model.retries", usage.llm_retry_count, model)


def count_replayed(kind: str) -> None:
    """Count a call that was answered from the journal."""
    if signals.is_measuring():
        signals.count("openagents.calls.replayed", 1, {"openagents.call.kind": kind})


def _traceparent(canvas: str) -> str:
    """The traceparent that the producer has stored with the run; '' without one."""
    try:
        stored = loads(canvas) if canvas else {}
    except ValueError:
        return ""
    headers = stored.get("headers") if isinstance(stored, Mapping) else None
    value = headers.get(signals.TRACEPARENT) if isinstance(headers, Mapping) else None
    return value if isinstance(value, str) else ""
