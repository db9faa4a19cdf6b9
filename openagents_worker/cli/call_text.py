"""One recorded call as text: what was asked, what became of it, how long it took, what it cost."""

from __future__ import annotations

from openagents_worker.cli.display import short
from openagents_worker.producer.run_summary import CallState, CallSummary
from openagents_worker.producer.time_text import duration_text

__all__ = ["call_text", "duration_or_dash", "tokens_and_cost"]

ERROR_CHARS = 160


def duration_or_dash(ms: float | None) -> str:
    """A duration in milliseconds, or `-` if it is not known."""
    return "-" if ms is None else duration_text(ms)


def tokens_and_cost(call: CallSummary) -> str:
    """Input and output tokens of a model call and its cost in USD, as far as they are known."""
    used = call.usage
    if call.kind != "model" or not used:
        return ""
    cost = used.get("cost_usd")
    tokens = f"{used.get('input_tokens', 0)}+{used.get('output_tokens', 0)}"
    return tokens if cost is None else f"{tokens} ${cost:.6f}"


def call_text(call: CallSummary, running: str = "running") -> str:
    """What a call was asked and what became of it, on one line. `running` is shown while that is open."""
    arguments = f"{short(call.arguments)} " if call.arguments is not None else ""
    match call.outcome:
        case CallState.OK:
            arrow = "" if call.kind == "model" else "→ "
            return f"{arguments}{arrow}{short(call.result)}"
        case CallState.FAILED:
            return f"{arguments}failed: {call.code or 'error'}: {short(call.message or '', ERROR_CHARS)}"
        case CallState.RUNNING:
            return f"{arguments}{running}"
        case CallState.INTERRUPTED:
            return f"{arguments}interrupted"
        case CallState.WAITING:
            return f"{arguments}waits"
