"""The display. The only place that turns events, records and results into lines for people, or into JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import click

from openagents_worker.events import RunEvent
from openagents_worker.models import RunRecord, RunResult, RunUsage
from openagents_worker.store.listing import SessionSummary
from openagents_worker.store.runs import SessionView

__all__ = [
    "Follower",
    "dump",
    "left_nothing_line",
    "record_lines",
    "run_line",
    "session_line",
    "session_lines",
]

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
COLOURS = {
    "failed": "red",
    "cancelled": "yellow",
    "poisoned": "red",
    "completed": "green",
    "recovered": "yellow",
}


def dump(value: Any) -> None:
    """One JSON value on a line of its own on standard output."""
    click.echo(json.dumps(value, ensure_ascii=False))


class Follower:
    """Shows a run as it goes: JSON lines on standard output, or the events on standard error and the answer
    on standard output. The pieces of a reply are shown on a terminal, or where `pieces` asks for them."""

    def __init__(self, *, as_json: bool, pieces: bool = False) -> None:
        self._as_json = as_json
        self._live = (pieces or sys.stderr.isatty()) and not as_json
        self._in_reply = False

    def event(self, event: RunEvent) -> None:
        if self._as_json:
            click.echo(event.to_json())
        elif event.name == "llm.delta":
            self._piece(event)
        elif not event.name.startswith(QUIET):
            self._end_reply()
            click.echo(_event_line(event), err=True)

    def result(self, result: RunResult[Any]) -> None:
        self._end_reply()
        if self._as_json:
            dump({"result": result.model_dump(mode="json")})
            return
        if result.ok:
            output = result.final_output
            click.echo(
                output if isinstance(output, str) else json.dumps(output, ensure_ascii=False, indent=2)
            )
        elif result.error_details is not None:
            click.echo(
                f"{result.stop_reason}: {result.error_details.code}: {result.error_details.message}", err=True
            )
        else:
            click.echo(str(result.stop_reason), err=True)
        click.echo(click.style(f"{result.run_id} · {_usage(result.usage)}", dim=True), err=True)

    def _piece(self, event: RunEvent) -> None:
        if not self._live:
            return
        if self._in_reply and event.payload.get("offset") == 0:
            click.echo(err=True)  # another attempt at the reply: it begins again
        self._in_reply = True
        click.echo(str(event.payload.get("text", "")), nl=False, err=True)

    def _end_reply(self) -> None:
        if self._in_reply:
            click.echo(err=True)
        self._in_reply = False


def record_lines(record: RunRecord, events: Iterable[RunEvent]) -> list[str]:
    """A run for people; its tools are counted from its events."""
    tools = Counter(str(event.payload["tool_id"]) for event in events if event.name == "tool.called")
    rows: list[tuple[str, object]] = [
        ("run", record.run_id),
        ("state", record.state.value),
        ("agent", record.agent_id),
        ("session", record.session_id),
        ("worker", record.worker or "-"),
        ("attempts", f"{record.attempt} ({record.retries} retries, {record.recoveries} recoveries)"),
        ("steps", record.steps),
        ("tools", ", ".join(f"{name} x{count}" for name, count in tools.items()) or record.usage.tool_calls),
        ("usage", _usage(record.usage)),
    ]
    result = record.result
    if result is not None and result.error_details is not None:
        rows.append(("error", f"{result.error_details.code}: {result.error_details.message}"))
        rows += [("hint", result.error_details.hint)] if result.error_details.hint else []
    elif result is not None:
        rows.append(("answer", _short(result.final_output)))
    return [f"{name:<9} {value}" for name, value in rows]


def run_line(record: RunRecord) -> str:
    """A run in a list for people."""
    state = click.style(f"{record.state:<15}", fg=COLOURS.get(record.state))
    at = "" if record.created_ms is None else _time(record.created_ms)
    where = click.style(f"{record.agent_id} in {record.session_id}", dim=True)
    return f"{at}  {state}  {record.run_id}  {where}"


def session_line(session: SessionSummary) -> str:
    """A session in a list for people."""
    busy = f"busy with {session.holder}, {session.waiting} waiting" if session.holder else "idle"
    counts = f"{session.messages} messages, {session.artifacts} artifacts"
    return f"{_time(session.last_run_ms)}  {session.session_id}  {click.style(f'{counts}, {busy}', dim=True)}"


def session_lines(session: SessionView) -> list[str]:
    """A session for people: what it is, and then what was said in it."""
    rows: list[tuple[str, object]] = [
        ("session", session.session_id),
        ("holder", session.holder or "-"),
        ("waiting", ", ".join(session.waiting) or "-"),
        ("bytes", f"{session.bytes:,}"),
        *(("artifact", f"{one.kind} {one.name}: {_short(one.payload)}") for one in session.artifacts),
        *(("state", f"{name}: {_short(value)}") for name, value in session.state.items()),
    ]
    said = [f"{message.get('role', '?')}: {_short(message.get('content'))}" for message in session.transcript]
    return [*(f"{name:<9} {value}" for name, value in rows), *said]


def left_nothing_line(record: RunRecord) -> str:
    """A run that has ended and of which nothing stands in its session's transcript."""
    details = record.result.error_details if record.result else None
    why = f" ({details.code}: {_short(details.message)})" if details else ""
    return click.style(f"not in it: run {record.run_id} {record.state}{why}", dim=True)


def _time(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000, UTC).astimezone():%Y-%m-%d %H:%M:%S}"


def _event_line(event: RunEvent) -> str:
    last = event.name.rsplit(".", 1)[-1]
    known = {
        "agent_id",
        "session_id",
        "run_id",
        "error_details",
        "_metrics",
        "call",
    }  # in every line, or in show
    pairs = " ".join(f"{key}={_short(value)}" for key, value in event.payload.items() if key not in known)
    name = click.style(event.name, fg=COLOURS.get(last), bold=last in COLOURS)
    return f"{event.timestamp.astimezone():%H:%M:%S} {name} {click.style(pairs, dim=True)}".rstrip()


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}…"


def _usage(usage: RunUsage) -> str:
    cost = "cost unknown" if usage.cost_usd is None else f"${usage.cost_usd:.6f}"
    return (
        f"{usage.llm_calls} model calls, {usage.tool_calls} tool calls, "
        f"{usage.input_tokens} + {usage.output_tokens} tokens, {cost}"
    )
