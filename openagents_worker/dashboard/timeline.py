"""The timeline of a run. The only place that turns its events into rows with bars to scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from openagents_worker.dashboard.shown_text import (
    LongText,
    cost_text,
    count_text,
    long_text,
    ms_of,
    short_text,
    took_text,
)
from openagents_worker.events import RunEvent
from openagents_worker.models import RunRecord
from openagents_worker.producer.call_names import short_call_id
from openagents_worker.producer.run_summary import AttemptSummary, CallState, CallSummary, RunSummary

__all__ = ["MAX_ROWS", "Row", "Timeline", "timeline_of"]

MAX_ROWS = 200  # of one page; the newest ones of a longer run
LEAST_WIDTH = 0.4  # percent: a bar of a few pixels on a small screen
VALUE_CHARS = 2_000

Tone = Literal["good", "bad", "busy", "wait", "off", "idle"]

_TONES: Mapping[CallState, Tone] = {
    CallState.OK: "good",
    CallState.FAILED: "bad",
    CallState.RUNNING: "busy",
    CallState.INTERRUPTED: "off",
    CallState.WAITING: "wait",
}
_FIRST_WAITS = {
    "run.queued": "in the queue",
    "run.scheduled": "for its start time",
    "run.waiting_session": "for its session",
}


@dataclass(slots=True)
class Row:
    """A row of the timeline. Times are milliseconds since 1970; `ended_ms` None: not over.

    `x` and `width` are the bar, in percent of the whole run.
    """

    kind: Literal["attempt", "model", "tool", "step", "wait", "child"]
    title: str
    tone: Tone
    began_ms: int
    ended_ms: int | None
    note: str = ""
    figures: tuple[str, ...] = ()
    call_id: str = ""
    checkpoint_id: str = ""
    child_run_id: str = ""
    code: str = ""
    message: str = ""
    arguments: LongText = field(default_factory=lambda: LongText(""))
    result: LongText = field(default_factory=lambda: LongText(""))
    x: float = 0.0
    width: float = 0.0
    took: str = ""

    @property
    def has_details(self) -> bool:
        return bool(self.arguments or self.result or self.message or self.checkpoint_id)

    @property
    def label(self) -> str:
        """The row in words, for a screen reader."""
        return f"{self.kind} {self.title}: {self.note or self.tone}, {self.took}"


@dataclass(frozen=True, slots=True)
class Timeline:
    """The rows, oldest first. `left_out` older rows are not shown. `took_ms` is the length of the scale."""

    rows: tuple[Row, ...]
    left_out: int
    took_ms: int
    is_whole: bool

    @property
    def marks(self) -> list[tuple[float, str]]:
        """The marks of the scale: the place in percent, and the time since the beginning."""
        return [(part * 25.0, took_text(self.took_ms * part / 4)) for part in range(5)]


def timeline_of(
    record: RunRecord,
    events: Sequence[RunEvent],
    summary: RunSummary,
    checkpoint_of: Mapping[str, str],
    now_ms: int,
) -> Timeline:
    """The timeline. `checkpoint_of` maps the ids of calls to those of their checkpoints."""
    end_ms = record.ended_ms if record.state.is_terminal else None
    rows = sorted(
        [
            *_waits(events, summary.attempts, end_ms),
            *(_attempt_row(attempt, record) for attempt in summary.attempts),
            *(_call_row(call, checkpoint_of) for call in summary.calls),
            *_children(events),
        ],
        key=lambda row: row.began_ms,
    )
    last_ms = end_ms or now_ms
    left_out, rows = max(0, len(rows) - MAX_ROWS), rows[-MAX_ROWS:]
    first_ms = min((row.began_ms for row in rows), default=last_ms)
    last_ms = max([last_ms, first_ms + 1, *(row.ended_ms or 0 for row in rows)])
    for row in rows:
        _set_bar(row, first_ms, last_ms)
    return Timeline(tuple(rows), left_out, last_ms - first_ms, summary.is_whole)


def _set_bar(row: Row, first_ms: int, last_ms: int) -> None:
    ended_ms = last_ms if row.ended_ms is None else row.ended_ms
    scale = 100 / (last_ms - first_ms)
    row.width = round(max(LEAST_WIDTH, (ended_ms - row.began_ms) * scale), 3)
    row.x = round(min((row.began_ms - first_ms) * scale, 100 - row.width), 3)
    row.took = took_text(ended_ms - row.began_ms)


def _attempt_row(attempt: AttemptSummary, record: RunRecord) -> Row:
    is_running = not attempt.ended and attempt.number == record.attempt and not record.state.is_terminal
    tone: Tone = "busy" if is_running else "good" if attempt.ended == "completed" else "off"
    if attempt.ended == "failed" or attempt.code:
        tone = "bad"
    elif attempt.ended.startswith("parked"):
        tone = "wait"
    note = attempt.ended or ("running" if is_running else "unknown end")
    return Row(
        "attempt",
        f"Attempt {attempt.number}",
        tone,
        ms_of(attempt.began_at),
        ms_of(attempt.ended_at) if attempt.ended_at else None,
        note=short_text(note),
        code=attempt.code or "",
        figures=(short_text(attempt.worker, 80),),
    )


def _call_row(call: CallSummary, checkpoint_of: Mapping[str, str]) -> Row:
    tries = (count_text(call.tries, "try"),) if call.tries > 1 else ()
    return Row(
        call.kind if call.kind in ("model", "tool") else "step",  # type: ignore[arg-type]  # literals of `Row`
        short_text(call.name, 80),
        _TONES[call.outcome],
        ms_of(call.began_at),
        ms_of(call.ended_at) if call.ended_at else None,
        note=call.outcome.value,
        figures=(*tries, *_figures(call)),
        call_id=short_call_id(call.call_id),
        checkpoint_id=checkpoint_of.get(call.call_id, ""),
        code=call.code or "",
        message=long_text(call.message, VALUE_CHARS).text,
        arguments=long_text(call.arguments, VALUE_CHARS),
        result=long_text(call.result, VALUE_CHARS),
    )


def _figures(call: CallSummary) -> Iterator[str]:
    """Tokens, cost and the time to the first token of a model call."""
    used = call.usage
    if call.kind != "model" or not used:
        return
    yield f"{used.get('input_tokens', 0):,} + {used.get('output_tokens', 0):,} tokens"
    if used.get("cost_usd") is not None:
        yield cost_text(used["cost_usd"])
    if used.get("ttft_ms") is not None:
        yield f"first token {took_text(used['ttft_ms'])}"


def _waits(
    events: Sequence[RunEvent], attempts: Sequence[AttemptSummary], end_ms: int | None
) -> Iterator[Row]:
    """The times without an attempt: before the first one, and after each that did not end the run."""
    starts = [ms_of(attempt.began_at) for attempt in attempts]
    first = next((event for event in events if event.name in _FIRST_WAITS), None)
    if first is not None and (not starts or ms_of(first.timestamp) <= starts[0]):
        yield Row(
            "wait",
            f"Waits {_FIRST_WAITS[first.name]}",
            "idle",
            ms_of(first.timestamp),
            starts[0] if starts else end_ms,
        )
    for at, attempt in enumerate(attempts):
        if attempt.ended_at is None or attempt.ended in ("completed", "failed"):
            continue
        if attempt.ended.startswith("cancelled"):
            continue
        next_ms = starts[at + 1] if at + 1 < len(starts) else end_ms
        yield Row(
            "wait",
            short_text(f"Waits {_waited_for(attempt)}", 80),
            "wait",
            ms_of(attempt.ended_at),
            next_ms,
        )


def _waited_for(attempt: AttemptSummary) -> str:
    """For what a run waits after the attempt."""
    if attempt.ended.startswith("parked: "):
        return f"for {attempt.ended.removeprefix('parked: ')}"
    return "for its retry" if attempt.ended.startswith("retry") else "for another worker"


def _children(events: Iterable[RunEvent]) -> Iterator[Row]:
    """The child runs that events name."""
    rows: dict[str, Row] = {}
    for event in events:
        child = event.payload.get("child_run_id")
        if not isinstance(child, str):
            continue
        at_ms = ms_of(event.timestamp)
        if event.name == "run.child_started":
            agent = short_text(event.payload.get("agent_id"), 60)
            rows[child] = Row("child", f"Child {agent}", "busy", at_ms, None, child_run_id=child)
        elif child in rows and event.name == "run.child_completed":
            _end_child(rows[child], at_ms, event.payload)
    yield from rows.values()


def _end_child(row: Row, at_ms: int, payload: Mapping[str, Any]) -> None:
    reason = short_text(payload.get("stop_reason"), 60)
    row.ended_ms, row.note, row.tone = at_ms, reason, "good" if reason == "completed" else "bad"
