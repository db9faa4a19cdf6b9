"""What has happened in a run, from its stored events: its attempts, and its calls of models and tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from openagents_worker.events import RunEvent

__all__ = ["AttemptStory", "CallOutcome", "RunCall", "Story", "find_call", "short_call_id", "story_of"]

HEX_CHARS = 8  # of a call's digest on screen


class CallOutcome(StrEnum):
    """How a recorded call stands. INTERRUPTED: its attempt ended first; it is made again if the run goes
    on."""

    RUNNING = "running"
    OK = "ok"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(slots=True)
class AttemptStory:
    """One try at the run by one worker. `ended` says how it ended, '' while it goes on."""

    number: int
    life: int
    worker: str
    began_at: datetime
    ended_at: datetime | None = None
    ended: str = ""
    code: str | None = None

    @property
    def took_ms(self) -> int | None:
        return _took_ms(self)

    def to_json(self) -> dict[str, Any]:
        return _with_times(self)


@dataclass(slots=True)
class RunCall:
    """A recorded call of the run: of a model or of a tool. It was made `tries` times.

    `arguments` and `result` are what the events show of them: the beginning.
    """

    call_id: str
    kind: str
    name: str
    began_at: datetime
    tries: int = 0
    outcome: CallOutcome = CallOutcome.RUNNING
    ended_at: datetime | None = None
    arguments: Any = None
    result: Any = None
    code: str | None = None
    message: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def took_ms(self) -> int | None:
        return _took_ms(self)

    def to_json(self) -> dict[str, Any]:
        return _with_times(self)


@dataclass(slots=True)
class Story:
    """`waited_ms` is how long the run waited for its first start, once it was due; None: it has not started.

    `is_whole` is False where the first events have been trimmed.
    """

    attempts: list[AttemptStory] = field(default_factory=list)
    calls: list[RunCall] = field(default_factory=list)
    waited_ms: int | None = None
    is_whole: bool = True


def short_call_id(call_id: str) -> str:
    """A call id as it is shown: `{name}:{8 hex}:{n}`.

    >>> short_call_id("weather:0123456789abcdef:2")
    'weather:01234567:2'
    """
    name, found, rest = call_id.rpartition(":")
    before, _, digest = name.rpartition(":")
    if not found or not before or len(digest) <= HEX_CHARS or set(digest) - set("0123456789abcdef"):
        return call_id
    return f"{before}:{digest[:HEX_CHARS]}:{rest}"


def find_call(call_ids: Iterable[str], wanted: str) -> list[str]:
    """Those of the ids that begin with what was typed, or are shown so; one alone where it is exact.

    >>> find_call(["calc:0123456789:1", "calc:0199999999:1"], "calc:012")
    ['calc:0123456789:1']
    """
    ids = list(dict.fromkeys(call_ids))
    exact = [id_ for id_ in ids if wanted in (id_, short_call_id(id_))]
    return exact or [id_ for id_ in ids if id_.startswith(wanted) or short_call_id(id_).startswith(wanted)]


def story_of(events: Sequence[RunEvent]) -> Story:
    """The story that these events tell; they are a run's, oldest first, from as early as there are any."""
    story = Story(is_whole=not events or events[0].seq == 1)
    calls: dict[str, RunCall] = {}
    due_at: datetime | None = None
    for event in events:
        if event.name in ("run.queued", "run.waiting_session") and due_at is None:
            due_at = event.timestamp
        if event.name == "run.attempt_started":
            if not story.attempts and due_at is not None and story.is_whole:
                story.waited_ms = round((event.timestamp - due_at).total_seconds() * 1000)
            story.attempts.append(
                AttemptStory(event.attempt, event.life, event.worker or "?", event.timestamp)
            )
        elif _ends_attempt(story.attempts, event):
            for call in calls.values():
                if call.outcome is CallOutcome.RUNNING:
                    call.outcome, call.ended_at = CallOutcome.INTERRUPTED, event.timestamp
        _note_call(calls, event)
    story.calls = list(calls.values())
    return story


def _took_ms(part: AttemptStory | RunCall) -> int | None:
    return None if part.ended_at is None else round((part.ended_at - part.began_at).total_seconds() * 1000)


def _with_times(part: AttemptStory | RunCall) -> dict[str, Any]:
    ended_at = None if part.ended_at is None else part.ended_at.isoformat()
    times = {"began_at": part.began_at.isoformat(), "ended_at": ended_at, "took_ms": part.took_ms}
    return {**asdict(part), **times}


def _ends_attempt(attempts: list[AttemptStory], event: RunEvent) -> bool:
    if not attempts or attempts[-1].ended or (ending := _ending(event)) is None:
        return False
    attempts[-1].ended, attempts[-1].code = ending
    attempts[-1].ended_at = event.timestamp
    return True


def _ending(event: RunEvent) -> tuple[str, str | None] | None:
    """How an attempt ends with this event, and the code of the error; None for any other event."""
    said = event.payload
    match event.name:
        case "run.completed":
            return "completed", None
        case "run.failed":
            return "failed", _code(said)
        case "run.cancelled":
            return f"cancelled: {said.get('reason') or 'no reason given'}", None
        case "run.retry_scheduled":
            return f"put off for {_seconds(said.get('delay_ms'))}", str(said.get("error_code") or "")
        case "run.recovered":
            return "its worker was gone", None
        case "run.handed_over":
            return "its worker was told to stop; handed over", None
        case "run.left_to_others":
            return "its worker cannot execute it; left to others", str(said.get("error_code") or "") or None
    return None


def _note_call(calls: dict[str, RunCall], event: RunEvent) -> None:
    said = event.payload
    match event.name:
        case "llm.called":
            _begun(calls, event, str(said.get("call")), "model", str(said.get("model")))
        case "tool.called":
            call = _begun(calls, event, str(said.get("call_id")), "tool", str(said.get("tool_id")))
            call.arguments = said.get("params")
        case "llm.succeeded" | "tool.succeeded":
            if (ended := calls.get(str(said.get("call") or said.get("call_id")))) is not None:
                ended.outcome, ended.ended_at = CallOutcome.OK, event.timestamp
                ended.code = ended.message = None
                ended.result = said.get("result") if ended.kind == "tool" else _reply(said)
                metrics = said.get("_metrics")
                ended.usage = dict(metrics) if isinstance(metrics, dict) else {}
        case "llm.failed" | "tool.failed":
            if (ended := calls.get(str(said.get("call") or said.get("call_id")))) is not None:
                ended.outcome, ended.ended_at = CallOutcome.FAILED, event.timestamp
                ended.code, ended.message = _code(said), _message(said)


def _begun(calls: dict[str, RunCall], event: RunEvent, call_id: str, kind: str, name: str) -> RunCall:
    call = calls.setdefault(call_id, RunCall(call_id, kind, name, event.timestamp))
    call.tries += 1
    call.began_at, call.outcome, call.ended_at = event.timestamp, CallOutcome.RUNNING, None
    return call


def _reply(said: Mapping[str, Any]) -> Any:
    """What the model replied: its text, else the tools that it wants called."""
    return said.get("output_text") or _wanted_tools(said.get("tool_calls"))


def _wanted_tools(names: Any) -> str:
    return f"calls {', '.join(map(str, names))}" if isinstance(names, Iterable) and names else ""


def _code(said: Mapping[str, Any]) -> str | None:
    details = said.get("error_details")
    return str(details.get("code")) if isinstance(details, Mapping) else None


def _message(said: Mapping[str, Any]) -> str | None:
    details = said.get("error_details")
    found = details.get("message") if isinstance(details, Mapping) else said.get("error")
    return None if found is None else str(found)


def _seconds(delay_ms: Any) -> str:
    return f"{delay_ms / 1000:.1f} s" if isinstance(delay_ms, int | float) else "a while"
