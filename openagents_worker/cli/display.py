"""The live display of a run. The only place that turns its events and its result into text or JSON lines."""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import Any, Self

from openagents_worker.cli.terminal import Safe, dump, dump_text, err, joined, out, piece, styled
from openagents_worker.events import RunEvent
from openagents_worker.models import ErrorDetails, RunResult, RunUsage
from openagents_worker.printable import one_line
from openagents_worker.producer.call_names import short_call_id
from openagents_worker.producer.run_summary import waits_text

__all__ = ["STATE_COLOURS", "Follower", "error_lines", "event_line", "is_shown", "short", "usage_text"]

MAX_CHARS = 100  # of one value in a line; the JSON contains the complete value
HIDDEN_PREFIXES = (
    "context.",
    "memory.",
    "tool.preflight",
    "usage.",
    "run.checkpoint_saved",
    "run.validated",
    "session.acquired",
)
DELAYS = ("llm.retrying", "run.retry_scheduled")
STATE_COLOURS = {
    "failed": "red",
    "cancelled": "yellow",
    "poisoned": "red",
    "completed": "green",
    "recovered": "yellow",
    "retry_scheduled": "yellow",
    "running": "cyan",
    "retrying": "yellow",
    "awaiting_approval": "yellow",
    "waiting_child": "yellow",
    "waiting": "yellow",
    "paused": "yellow",
}
CALL_IDS = ("call_id",)
HIDDEN_FIELDS = {"agent_id", "session_id", "run_id", "error_details", "_metrics", "call"}
"""Fields of a payload that are the same in every event, or that `openagents-worker show` shows."""


class Follower:
    """Shows a run while it is executed.

    With `as_json`: JSON lines on standard output. Otherwise: events on standard error and the answer on
    standard output. Pieces of a model's reply and of a tool's output are shown if standard error is a
    terminal, or with `pieces`. It is used in a `with` block.
    """

    def __init__(self, *, as_json: bool, pieces: bool = False) -> None:
        self._as_json = as_json
        self._live = (pieces or sys.stderr.isatty()) and not as_json
        self._in_reply = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._end_reply()

    def event(self, event: RunEvent) -> None:
        """Print an event. Events of preparation and memory are hidden unless they report a failure."""
        if self._as_json:
            dump_text(event.to_json())
        elif event.name in ("llm.delta", "tool.delta"):
            self._piece(event)
        elif is_shown(event):
            self._end_reply()
            err(event_line(event))

    def result(self, result: RunResult[Any]) -> None:
        """Print the answer or the error of the run, and its usage."""
        self._end_reply()
        if self._as_json:
            dump({"result": result.model_dump(mode="json")})
            return
        if result.ok:
            output = result.final_output
            out(output if isinstance(output, str) else json.dumps(output, ensure_ascii=False, indent=2))
        elif result.error_details is not None:
            for line in error_lines(result.stop_reason, result.error_details):
                err(line)
        else:
            err(str(result.stop_reason))
        err(styled(f"{result.run_id} · {usage_text(result.usage)}", dim=True))

    def _piece(self, event: RunEvent) -> None:
        """Print a piece of a model's reply or of a tool's output, if pieces are shown."""
        if not self._live or event.payload.get("kind", "text") != "text":
            return
        if self._in_reply and event.payload.get("offset") == 0:
            err()  # another text begins, or the call was repeated
        self._in_reply = True
        piece(str(event.payload.get("text", "")))

    def _end_reply(self) -> None:
        if self._in_reply:
            err()
        self._in_reply = False


def error_lines(stop_reason: str, error: ErrorDetails) -> list[Safe]:
    """The error that ended a run: code and message, then the hint and the traceback, if there are any."""
    traceback = error.traceback
    return [
        joined(styled(f"{stop_reason}: {error.code}", fg="red"), f": {error.message}"),
        *([joined("  hint: ", error.hint)] if error.hint else []),
        *([styled(traceback.rstrip(), dim=True)] if traceback else []),
    ]


def short(value: object, max_chars: int = MAX_CHARS) -> str:
    """The value on one line, as text or JSON, cut to `max_chars`."""
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), max_chars)


def usage_text(usage: RunUsage) -> str:
    """Calls, tokens and cost on one line."""
    cost = "cost unknown" if usage.cost_usd is None else f"${usage.cost_usd:.6f}"
    repeated = f" ({usage.llm_retry_count} retried)" if usage.llm_retry_count else ""
    return (
        f"{_count(usage.llm_calls, 'model call')}{repeated}, {_count(usage.tool_calls, 'tool call')}, "
        f"{usage.input_tokens} + {usage.output_tokens} tokens, {cost}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def event_line(event: RunEvent) -> Safe:
    """Time, name and fields of an event on one line."""
    last = event.name.rsplit(".", 1)[-1]
    details = event.payload.get("error_details")
    code = ""
    if isinstance(details, dict) and "code" not in event.payload:
        code = f"code={details.get('code')} "
    pairs = code + " ".join(
        f"{key}={short_call_id(str(value)) if key in CALL_IDS else short(value)}"
        for key, value in _shown_payload(event).items()
    )
    name = styled(event.name, fg=STATE_COLOURS.get(last), bold=last in STATE_COLOURS)
    at = f"{event.timestamp.astimezone():%H:%M:%S}"
    return joined(at, name, styled(pairs, dim=True), sep=" ") if pairs else joined(at, name, sep=" ")


def _shown_payload(event: RunEvent) -> dict[str, Any]:
    """The fields of an event's payload that its line shows."""
    hidden = HIDDEN_FIELDS | ({"message", "type"} if "error" in event.payload else set())
    payload = {key: value for key, value in event.payload.items() if key not in hidden}
    if event.name == "run.waiting":
        payload["waiting"] = waits_text(payload)
    if event.name in DELAYS and isinstance(delay_ms := payload.pop("delay_ms", None), int):
        payload.pop("due_at", None)
        payload["again_in"] = f"{delay_ms / 1000:.3g} s"
    return payload


def is_shown(event: RunEvent) -> bool:
    """Whether people see the event: not preparation and memory, unless something failed there."""
    is_failure = event.name.endswith("failed") or event.payload.get("result") == "error"  # a tool's preflight
    return is_failure or not event.name.startswith(HIDDEN_PREFIXES)
