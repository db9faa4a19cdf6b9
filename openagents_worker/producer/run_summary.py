"""The summary of a run. The only place that computes its attempts and its calls from the stored events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from openagents_worker.events import RunEvent

__all__ = [
    "AttemptSummary",
    "CallState",
    "CallSummary",
    "RunSummary",
    "SummaryOfEvents",
    "summarize_events",
    "waits_text",
]

NOT_MADE = frozenset({"approval", "limit", "budget"})
"""Kinds of waits before a call: nothing of it was executed. (`WaitKind`)"""
SUSPENSIONS = frozenset({"run.waiting", "run.handed_over", "run.retry_scheduled"})
"""The events of an attempt that ends in order. The next one goes on with the calls that it was in."""


class CallState(StrEnum):
    """The state of a recorded call.

    INTERRUPTED: the attempt ended before the call did. The call is repeated if the run continues.
    WAITING: the run is parked before the call or in it. The call goes on when the run does.
    """

    RUNNING = "running"
    OK = "ok"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    WAITING = "waiting"


@dataclass(slots=True)
class AttemptSummary:
    """One attempt of a worker to execute the run.

    `ended` is a text about how the attempt ended, '' while it is running. `code` is the code of its error.
    """

    number: int
    life: int
    worker: str
    began_at: datetime
    ended_at: datetime | None = None
    ended: str = ""
    code: str | None = None

    @property
    def took_ms(self) -> int | None:
        return _duration_ms(self)

    def to_json(self) -> dict[str, Any]:
        return _with_times(self)


@dataclass(slots=True)
class CallSummary:
    """A recorded call of a model, a tool or a function. `tries` counts how often it was begun.

    A call that has only been asked about (its approval, a limit) was not begun.

    `arguments` and `result` are cut: events contain only the beginning of long values.
    """

    call_id: str
    kind: str
    name: str
    began_at: datetime
    tries: int = 0
    outcome: CallState = CallState.RUNNING
    ended_at: datetime | None = None
    arguments: Any = None
    result: Any = None
    code: str | None = None
    message: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def took_ms(self) -> int | None:
        return _duration_ms(self)

    def to_json(self) -> dict[str, Any]:
        return _with_times(self)


@dataclass(slots=True)
class RunSummary:
    """The attempts and the calls of a run, each in the order of their first start.

    `waited_ms` is the time between the moment when the run was due and its first start. It is None if the run
    has not started or if its first events were trimmed; in the second case `is_whole` is False.
    """

    attempts: list[AttemptSummary] = field(default_factory=list)
    calls: list[CallSummary] = field(default_factory=list)
    waited_ms: int | None = None
    is_whole: bool = True


class SummaryOfEvents:
    """Builds the summary of a run from its events, one after the other, oldest first."""

    def __init__(self) -> None:
        self.calls: dict[str, CallSummary] = {}
        """By their ids, in the order of their first start."""
        self._summary = RunSummary()
        self._suspended: set[str] = set()
        """The calls in which the run was suspended in this life: each attempt goes on with them."""
        self._only_asked: set[str] = set()
        """The calls that were only asked about: their try is not counted yet."""
        self._due_at: datetime | None = None
        self._is_empty = True

    @property
    def summary(self) -> RunSummary:
        """What the events so far say."""
        self._summary.calls = list(self.calls.values())
        return self._summary

    def add(self, event: RunEvent) -> None:
        """Take the next event."""
        summary = self._summary
        if self._is_empty:
            self._is_empty, summary.is_whole = False, event.seq == 1
        if event.name in ("run.queued", "run.waiting_session") and self._due_at is None:
            self._due_at = event.timestamp
        if event.name == "run.attempt_started":
            if not summary.attempts and self._due_at is not None and summary.is_whole:
                summary.waited_ms = round((event.timestamp - self._due_at).total_seconds() * 1000)
            summary.attempts.append(
                AttemptSummary(event.attempt, event.life, event.worker or "?", event.timestamp)
            )
            self._continue_calls()
        elif event.name == "run.resumed":
            self._suspended.clear()
        elif _ends_attempt(summary.attempts, event) or event.is_terminal:
            self._end_calls(event)
        self._update_call(event)

    def _continue_calls(self) -> None:
        """An attempt begins: it goes on with the calls in which the run was suspended, without an event."""
        for call_id in self._suspended:
            call = self.calls[call_id]
            if call.outcome in (CallState.WAITING, CallState.INTERRUPTED):
                call.outcome, call.ended_at = CallState.RUNNING, None

    def _end_calls(self, event: RunEvent) -> None:
        """Mark the calls that this event has interrupted or parked: the end of an attempt or of the run."""
        parks = event.name == "run.waiting"
        waits = _waits(event.payload) if parks else []
        waiting = {str(wait.get("call_id")) for wait in waits}
        not_made = {str(wait.get("call_id")) for wait in waits if str(wait.get("kind")) in NOT_MADE}
        for call in self.calls.values():
            was_interrupted = call.outcome is CallState.INTERRUPTED and call.call_id in waiting
            if call.outcome is CallState.RUNNING or was_interrupted:
                call.outcome = CallState.WAITING if parks else CallState.INTERRUPTED
                call.ended_at = event.timestamp
                self._count_try(call, was_made=call.call_id not in not_made)
                if event.name in SUSPENSIONS and call.kind != "model":
                    self._suspended.add(call.call_id)
            elif call.outcome is CallState.WAITING:
                call.outcome = CallState.INTERRUPTED

    def _count_try(self, call: CallSummary, *, was_made: bool) -> None:
        """Count the try of a call once it is more than asked about."""
        if was_made and call.call_id in self._only_asked:
            self._only_asked.remove(call.call_id)
            call.tries += 1
        elif not was_made and call.call_id not in self._only_asked:
            self._only_asked.add(call.call_id)
            call.tries -= 1

    def _update_call(self, event: RunEvent) -> None:
        payload = event.payload
        match event.name:
            case "llm.called":
                self._start_call(event, str(payload.get("call")), "model", str(payload.get("model")))
            case "tool.called":
                call_id, tool_id = str(payload.get("call_id")), str(payload.get("tool_id"))
                self._start_call(event, call_id, "tool", tool_id).arguments = payload.get("params")
            case "step.started":
                call_id, name = str(payload.get("call_id")), str(payload.get("name"))
                self._start_call(event, call_id, "step", name).arguments = payload.get("params")
            case "llm.succeeded" | "tool.succeeded" | "step.succeeded":
                if (ended := self._ended_call(event, CallState.OK)) is not None:
                    ended.code = ended.message = None
                    ended.result = _reply_text(payload) if ended.kind == "model" else payload.get("result")
                    ended.usage = _numbers_in(payload.get("_metrics"))
            case "llm.failed" | "tool.failed" | "step.failed":
                if (ended := self._ended_call(event, CallState.FAILED)) is not None:
                    ended.code, ended.message = _error_code_of(payload), _error_text_of(payload)

    def _start_call(self, event: RunEvent, call_id: str, kind: str, name: str) -> CallSummary:
        call = self.calls.setdefault(call_id, CallSummary(call_id, kind, name, event.timestamp))
        self._only_asked.discard(call_id)
        call.tries += 1
        call.began_at, call.outcome, call.ended_at = event.timestamp, CallState.RUNNING, None
        return call

    def _ended_call(self, event: RunEvent, outcome: CallState) -> CallSummary | None:
        """The call that has ended with this event; None if its beginning is not known."""
        call = self.calls.get(str(event.payload.get("call") or event.payload.get("call_id")))
        if call is not None:
            self._count_try(call, was_made=True)
            self._suspended.discard(call.call_id)
            call.outcome, call.ended_at = outcome, event.timestamp
        return call


def summarize_events(events: Iterable[RunEvent]) -> RunSummary:
    """Summarize the events of one run: all that are stored, oldest first."""
    found = SummaryOfEvents()
    for event in events:
        found.add(event)
    return found.summary


def _duration_ms(part: AttemptSummary | CallSummary) -> int | None:
    return None if part.ended_at is None else round((part.ended_at - part.began_at).total_seconds() * 1000)


def _with_times(part: AttemptSummary | CallSummary) -> dict[str, Any]:
    ended_at = None if part.ended_at is None else part.ended_at.isoformat()
    times = {"began_at": part.began_at.isoformat(), "ended_at": ended_at, "took_ms": part.took_ms}
    return {**asdict(part), **times}


def _ends_attempt(attempts: list[AttemptSummary], event: RunEvent) -> bool:
    if not attempts or attempts[-1].ended or (ending := _ending(event)) is None:
        return False
    attempts[-1].ended, attempts[-1].code = ending
    attempts[-1].ended_at = event.timestamp
    return True


def _ending(event: RunEvent) -> tuple[str, str | None] | None:
    """How an attempt ends with this event, and the code of the error. None: the event does not end it."""
    payload = event.payload
    match event.name:
        case "run.completed":
            return "completed", None
        case "run.failed":
            return "failed", _error_code_of(payload)
        case "run.cancelled":
            return f"cancelled: {payload.get('reason') or 'no reason given'}", None
        case "run.retry_scheduled":
            return f"retry in {_delay_text(payload.get('delay_ms'))}", str(payload.get("error_code") or "")
        case "run.recovered":
            alone = "; it may have killed it, and is executed alone" if payload.get("alone") is True else ""
            return f"recovered from a dead worker{alone}", None
        case "run.waiting":
            return f"parked: {waits_text(payload)}", None
        case "run.handed_over":
            return "handed over by a stopping worker", None
        case "run.left_to_others":
            return "left to other workers", str(payload.get("error_code") or "") or None
    return None


def _waits(payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    waiting = payload.get("waiting")
    return [wait for wait in waiting if isinstance(wait, dict)] if isinstance(waiting, list) else []


def waits_text(payload: Mapping[str, Any]) -> str:
    """What the event `run.waiting` lists: `signal paid, timer`."""
    each = [" ".join(str(wait[key]) for key in ("kind", "name") if wait.get(key)) for wait in _waits(payload)]
    return ", ".join(dict.fromkeys(each)) or "waiting"


def _numbers_in(metrics: Any) -> dict[str, Any]:
    """The numbers of a model call. A pattern of others may have emitted anything under their names."""
    if not isinstance(metrics, dict):
        return {}
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _reply_text(payload: Mapping[str, Any]) -> Any:
    """The text of a model's reply. If there is none: the names of the tools that the reply calls."""
    return payload.get("output_text") or _tool_names(payload.get("tool_calls"))


def _tool_names(names: Any) -> str:
    return f"calls {', '.join(map(str, names))}" if isinstance(names, Iterable) and names else ""


def _error_code_of(payload: Mapping[str, Any]) -> str | None:
    details = payload.get("error_details")
    return str(details.get("code")) if isinstance(details, Mapping) else None


def _error_text_of(payload: Mapping[str, Any]) -> str | None:
    details = payload.get("error_details")
    found = details.get("message") if isinstance(details, Mapping) else payload.get("error")
    return None if found is None else str(found)


def _delay_text(delay_ms: Any) -> str:
    return f"{delay_ms / 1000:.1f} s" if isinstance(delay_ms, int | float) else "an unknown time"
