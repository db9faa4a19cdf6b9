"""Spans of a run: the only place that says what the spans of attempts and of recorded calls contain.

The names and the attributes follow OpenTelemetry's semantic conventions for generative AI. They contain ids
and counts, never a prompt, an answer, arguments or a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from openagents_worker.errors import OpenAgentsError
from openagents_worker.jsontext import loads
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import RunRequest
from openagents_worker.store.scripts import Claimed
from openagents_worker.telemetry import signals
from openagents_worker.telemetry.signals import NO_SPAN, AttributeValue, Span

if TYPE_CHECKING:
    from openagents_worker.runtime.attempt import AttemptResult
    from openagents_worker.runtime.recorder import Outcome

__all__ = ["attempt_span", "call_span", "count_replayed", "end_attempt_span", "end_call_span"]

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
    }
    return signals.span(f"invoke_agent {request.agent_id}", attributes, parent=_traceparent(claimed.canvas))


def end_attempt_span(span: Span, result: AttemptResult) -> AttemptResult:
    """Set the outcome of the attempt; returns the result."""
    if signals.is_enabled():
        outcome = {"openagents.outcome": str(result.kind.value)}
        span.set("openagents.outcome", outcome["openagents.outcome"])
        if result.stop_reason is not None:
            span.set("openagents.stop_reason", result.stop_reason.value)
        if result.error is not None:
            span.fail(result.error.code)
        signals.count("openagents.attempts", 1, outcome)
    return result


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
        attributes |= {"gen_ai.tool.name": info.name, "gen_ai.tool.call.id": info.call_id}
    return signals.span(f"{operation} {info.name}", attributes)


def end_call_span(span: Span, info: CallInfo, outcome: Outcome) -> Outcome:
    """Set the usage or the error of a call that was made; returns the outcome."""
    if signals.is_enabled():
        kind: dict[str, AttributeValue] = {"openagents.call.kind": info.kind}
        if isinstance(outcome.error, OpenAgentsError):
            span.fail(outcome.error.code)
            kind["error.type"] = outcome.error.code
        elif info.kind == "model":
            for direction in ("input", "output"):
                tokens = int(getattr(outcome.usage, f"{direction}_tokens"))
                span.set(f"gen_ai.usage.{direction}_tokens", tokens)
                model = {"gen_ai.request.model": info.name, "gen_ai.token.type": direction}
                signals.count("openagents.tokens", tokens, model)
        signals.count("openagents.calls", 1, kind)
    return outcome


def count_replayed(kind: str) -> None:
    """Count a call that was answered from the journal."""
    if signals.is_enabled():
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
