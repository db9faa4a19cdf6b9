"""The display of a run as it goes. The only place that turns events and a result into lines for people, or
JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from openagents_worker.cli.story import short_call_id
from openagents_worker.cli.terminal import Safe, dump, dump_text, err, joined, out, piece, styled
from openagents_worker.events import RunEvent
from openagents_worker.models import ErrorDetails, RunResult, RunUsage
from openagents_worker.printable import one_line

__all__ = ["STATE_COLOURS", "Follower", "error_lines", "short", "usage_text"]

MAX_CHARS = 100  # of a value in a line; the whole of it is in the JSON
QUIET = (
    "context.",
    "memory.",
    "tool.preflight",
    "usage.",
    "run.checkpoint_saved",
    "run.validated",
    "session.acquired",
)
WAITS = ("llm.retrying", "run.retry_scheduled")
STATE_COLOURS = {
    "failed": "red",
    "cancelled": "yellow",
    "poisoned": "red",
    "completed": "green",
    "recovered": "yellow",
    "retry_scheduled": "yellow",
    "running": "cyan",
    "retrying": "yellow",
}
CALL_IDS = ("call_id",)
IN_EVERY_LINE_OR_IN_SHOW = {"agent_id", "session_id", "run_id", "error_details", "_metrics", "call"}


class Follower:
    """Shows a run as it goes: JSON lines on standard output, or the events on standard error and the answer
    on standard output. The pieces of a reply are shown on a terminal, or where `pieces` asks for them."""

    def __init__(self, *, as_json: bool, pieces: bool = False) -> None:
        self._as_json = as_json
        self._live = (pieces or sys.stderr.isatty()) and not as_json
        self._in_reply = False

    def event(self, event: RunEvent) -> None:
        if self._as_json:
            dump_text(event.to_json())
        elif event.name == "llm.delta":
            self._piece(event)
        elif _says_something_failed(event) or not event.name.startswith(QUIET):
            self._end_reply()
            err(_event_line(event))

    def result(self, result: RunResult[Any]) -> None:
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
        if not self._live:
            return
        if self._in_reply and event.payload.get("offset") == 0:
            err()  # another attempt at the reply: it begins again
        self._in_reply = True
        piece(str(event.payload.get("text", "")))

    def _end_reply(self) -> None:
        if self._in_reply:
            err()
        self._in_reply = False


def error_lines(stop_reason: str, error: ErrorDetails) -> list[Safe]:
    """What ended a run: code and message, the hint, and the traceback where there is one."""
    traceback = error.traceback
    return [
        joined(styled(f"{stop_reason}: {error.code}", fg="red"), f": {error.message}"),
        *([joined("  hint: ", error.hint)] if error.hint else []),
        *([styled(traceback.rstrip(), dim=True)] if traceback else []),
    ]


def short(value: object, max_chars: int = MAX_CHARS) -> str:
    """A value on one line."""
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), max_chars)


def usage_text(usage: RunUsage) -> str:
    cost = "cost unknown" if usage.cost_usd is None else f"${usage.cost_usd:.6f}"
    repeated = f" ({usage.llm_retry_count} asked again)" if usage.llm_retry_count else ""
    return (
        f"{_count(usage.llm_calls, 'model call')}{repeated}, {_count(usage.tool_calls, 'tool call')}, "
        f"{usage.input_tokens} + {usage.output_tokens} tokens, {cost}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _event_line(event: RunEvent) -> Safe:
    last = event.name.rsplit(".", 1)[-1]
    details = event.payload.get("error_details")
    code = ""
    if isinstance(details, dict) and "code" not in event.payload:
        code = f"code={details.get('code')} "
    pairs = code + " ".join(
        f"{key}={short_call_id(str(value)) if key in CALL_IDS else short(value)}"
        for key, value in _told(event).items()
    )
    name = styled(event.name, fg=STATE_COLOURS.get(last), bold=last in STATE_COLOURS)
    at = f"{event.timestamp.astimezone():%H:%M:%S}"
    return joined(at, name, styled(pairs, dim=True), sep=" ") if pairs else joined(at, name, sep=" ")


def _told(event: RunEvent) -> dict[str, Any]:
    """What of an event's payload stands in its line."""
    left_out = IN_EVERY_LINE_OR_IN_SHOW | ({"message", "type"} if "error" in event.payload else set())
    payload = {key: value for key, value in event.payload.items() if key not in left_out}
    if event.name in WAITS and isinstance(delay_ms := payload.pop("delay_ms", None), int):
        payload.pop("due_at", None)
        payload["again_in"] = f"{delay_ms / 1000:.3g} s"
    return payload


def _says_something_failed(event: RunEvent) -> bool:
    return event.name.endswith("failed") or event.payload.get("result") == "error"  # a tool's preflight
