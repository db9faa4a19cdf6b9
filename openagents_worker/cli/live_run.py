"""A run while it is executed, as a tree of its steps on a terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from openagents_worker.cli.call_text import call_text, duration_or_dash, tokens_and_cost
from openagents_worker.cli.display import Follower, event_line, is_shown, usage_text
from openagents_worker.cli.live_region import LiveRegion
from openagents_worker.cli.terminal import Safe, err, joined, styled
from openagents_worker.events import RunEvent
from openagents_worker.models import RunUsage
from openagents_worker.printable import one_line
from openagents_worker.producer.run_summary import CallState, CallSummary, SummaryOfEvents
from openagents_worker.producer.time_text import duration_text

__all__ = ["LiveFollower", "RunTree"]

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
FRAME_S = 0.1
PIECE_CHARS = 400  # of the text that a model or a tool is producing: its end
SHOWN_PIECE_CHARS = 200
NOT_SHOWN = (
    "run.attempt_started",
    "run.requested",
    "session.run.started",
    "pattern.step_finished",
    "run.completed",
    "session.run.completed",
)
"""What the tree shows otherwise, or the answer below it."""
MARKS = {
    CallState.OK: ("✔", "green"),
    CallState.FAILED: ("✘", "red"),
    CallState.INTERRUPTED: ("⚡", "yellow"),
    CallState.WAITING: ("⏸", "yellow"),
}


class RunTree:
    """The steps of a run from its events. It prints nothing; the times come from the caller."""

    def __init__(self) -> None:
        self._summary = SummaryOfEvents()
        self._open: list[CallSummary | Safe] = []
        """What was not taken yet, in the order in which it began: calls, and lines about other events."""
        self._pieces: dict[str, dict[str, str]] = {}
        """The end of each text that a call produces, by kind and tool call; the newest is the last."""
        self._usage: RunUsage | None = None
        self._began_at: datetime | None = None
        self._is_executed = False

    def add(self, event: RunEvent) -> None:
        """Take the next event, live ones included."""
        if self._began_at is None:
            self._began_at = event.timestamp
            about = f"{event.agent_id}, session {event.session_id}"
            self._open.append(joined(styled(event.run_id, bold=True), styled(about, dim=True), sep=" "))
        if event.name in ("llm.delta", "tool.delta"):
            self._add_piece(event.payload)
            return
        self._summary.add(event)
        attempts = self._summary.summary.attempts
        self._is_executed = bool(attempts) and not attempts[-1].ended
        call = self._summary.calls.get(_call_id_of(event.payload))
        if event.name in ("llm.called", "tool.called", "step.started") and call is not None:
            self._pieces.pop(call.call_id, None)
            self._show(call)
        elif event.name == "run.attempt_started":
            for each in self._summary.calls.values():
                if _is_running(each):  # the run was parked in it, and the attempt goes on with it
                    self._show(each)
        elif event.name == "usage.updated":
            with suppress(ValueError):  # an event of the pattern with this name
                self._usage = RunUsage.model_validate(event.payload.get("usage") or {})
        elif event.name == "pattern.step_started":
            self._open.append(styled(f"step {event.payload.get('step')}", dim=True))
        elif is_shown(event) and event.name not in NOT_SHOWN and not _ends_a_call(event, call):
            self._open.append(event_line(event))

    def _show(self, call: CallSummary) -> None:
        if not any(each is call for each in self._open):
            self._open.append(call)

    def take_finished(self) -> list[Safe]:
        """The lines that do not change any more, in order. Each is returned once."""
        lines = []
        while self._open and not _is_running(self._open[0]):
            lines.append(_line_of(self._open.pop(0)))
        return lines

    def open_lines(self, now: datetime, frame: str) -> list[Safe]:
        """The steps that are running, each with the end of its text, and a line about the whole run."""
        lines = []
        for each in self._open:
            lines.append(_line_of(each, now, frame))
            if isinstance(each, CallSummary) and _is_running(each):
                newest = next(reversed(self._pieces.get(each.call_id, {}).values()), "")
                text = one_line(newest)[-SHOWN_PIECE_CHARS:]
                lines += [joined("    ", styled(text, dim=True))] if text else []
        took = duration_text((now - (self._began_at or now)).total_seconds() * 1000)
        mark = styled(frame, fg="cyan") if self._is_executed else styled("·", dim=True)
        used = "" if self._usage is None else usage_text(self._usage)
        return [*lines, joined(mark, took, styled(used, dim=True), sep=" ")]

    def _add_piece(self, payload: dict[str, Any]) -> None:
        call_id = _call_id_of(payload)
        of_call = self._pieces.setdefault(call_id, {})
        name = f"{payload.get('kind', 'text')} {payload.get('tool_call')}"
        before = of_call.pop(name, "")
        if payload.get("offset") == 0:
            before = ""
        of_call[name] = (before + str(payload.get("text", "")))[-PIECE_CHARS:]


class LiveFollower(Follower):
    """Shows a run as a tree of its steps, on a terminal. Its context is a `with` block."""

    def __init__(self, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        super().__init__(as_json=False)
        self._tree = RunTree()
        self._lock = threading.Lock()
        self._clock = clock
        self._region = LiveRegion(self._lines)

    def __enter__(self) -> Self:
        self._region.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        with self._lock:
            rest = self._tree.take_finished()
        for line in rest:
            err(line)
        self._region.__exit__(kind, error, tb)

    def event(self, event: RunEvent) -> None:
        with self._lock:
            self._tree.add(event)
            finished = self._tree.take_finished()
        for line in finished:
            err(line)

    def _lines(self) -> list[Safe]:
        frame = FRAMES[int(time.monotonic() / FRAME_S) % len(FRAMES)]
        with self._lock:
            return self._tree.open_lines(self._clock(), frame)


def _call_id_of(payload: dict[str, Any]) -> str:
    return str(payload.get("call") or payload.get("call_id"))


def _ends_a_call(event: RunEvent, call: CallSummary | None) -> bool:
    return call is not None and event.name.endswith((".succeeded", ".failed"))


def _is_running(each: CallSummary | Safe) -> bool:
    return isinstance(each, CallSummary) and each.outcome is CallState.RUNNING


def _line_of(each: CallSummary | Safe, now: datetime | None = None, frame: str = "") -> Safe:
    if not isinstance(each, CallSummary):
        return each
    if each.outcome is CallState.RUNNING:
        mark = styled(frame, fg="cyan")
        took = duration_or_dash(None if now is None else (now - each.began_at).total_seconds() * 1000)
    else:
        symbol, colour = MARKS[each.outcome]
        mark, took = styled(symbol, fg=colour), duration_or_dash(each.took_ms)
    tries = f"try {each.tries}" if each.tries > 1 else ""
    facts = " · ".join(filter(None, [took, tokens_and_cost(each), tries]))
    text = call_text(each) if each.outcome is not CallState.RUNNING else call_text(each, running="")
    return joined("  ", mark, " ", styled(each.name, bold=True), " ", text, styled(f"  {facts}", dim=True))
