"""Events. The only place that says which events exist, what their payloads hold and how they travel.

Names and payloads are the original SDK's, with ours added. The ids of run, session and agent stand in the
envelope, so a payload need not repeat them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from openagents_worker.suggest import nearest

__all__ = [
    "EVENT_SCHEMAS",
    "LIVE_ONLY_EVENTS",
    "TERMINAL_EVENTS",
    "EventSchema",
    "RunEvent",
    "check_event",
]


@dataclass(frozen=True, slots=True)
class EventSchema:
    """What is promised of the events of one name: `required` keys are always there."""

    name: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    description: str = ""


def _event(name: str, description: str, required: str = "", optional: str = "") -> EventSchema:
    return EventSchema(name, tuple(required.split()), tuple(optional.split()), description)


EVENT_SCHEMAS: Mapping[str, EventSchema] = {
    schema.name: schema
    for schema in (
        # a run's way through the system
        _event("run.queued", "accepted, and waiting for a worker; workers: 0 where none reads the queue", "",
               "queue workers hint"),
        _event("run.scheduled", "accepted, and not due before a time", "due_at", "delay_ms"),
        _event("run.waiting_session", "an earlier run works in the session", "", "position"),
        _event("run.attempt_started", "a worker has taken the run", "", "checkpoint_id"),
        _event("run.resumed", "a run that had ended goes on in a new life", "", "checkpoint_id life by"),
        _event("run.retry_scheduled", "a retryable error; the run goes on later",
               "due_at delay_ms error_code", "error error_details"),
        _event("run.recovered", "its worker is gone; the run is queued again", "previous_worker", "age_ms"),
        _event("run.handed_over", "its worker stops; the run is queued again", "", "previous_worker"),
        _event("run.left_to_others", "a worker cannot execute the run (format, agent); another one will",
               "left_by delay_ms", "format newest_read error_code"),
        _event("run.poisoned", "too many workers died of it, or gave it back, without a committed step",
               "recoveries", "limit"),
        _event("run.cancel_requested", "somebody wants the run to end", "", "reason"),
        _event("worker.false_alarm", "the worker it was taken from was alive: that recovery does not count",
               "alive seen_by"),
        # a run's work
        _event("run.requested", "the run's first attempt begins", "input_text"),
        _event("session.run.started", "the run works in its session", "", "input_text"),
        _event("run.validated", "agent, plugins and model are there"),
        _event("session.acquired", "the session is the run's"),
        _event("context.compact.started", "the assembler may shorten the past"),
        _event("context.compact_succeeded", "the assembler has shortened the past"),
        _event("context.compact.completed", "as it is now", "", "transcript_size duration_ms"),
        _event("context.compact_failed", "the past stays as it is", "error", "error_details"),
        _event("context.assemble.started", "the past that the run sees is being chosen"),
        _event("context.assemble.completed", "the past that the run sees", "transcript_size",
               "artifact_count duration_ms"),
        _event("tool.preflight", "a tool says whether it can work", "tool_id result", "duration_ms error"),
        _event("context.created", "pattern, tools and model are bound to the run"),
        _event("memory.inject.started", "the memory fills the run's view"),
        _event("memory.injected", "the memory has filled the run's view"),
        _event("memory.inject.completed", "as it is now", "", "view_size"),
        _event("memory.inject_failed", "the memory could not be read", "error", "error_details"),
        _event("pattern.phase", "the pattern enters another phase", "phase"),
        _event("pattern.plan_created", "the model has made a plan", "plan"),
        _event("pattern.step_started", "a step begins; counted from 1", "step", "plan_step"),
        _event("pattern.step_finished", "a step has ended", "step action"),
        _event("pattern.past_shortened", "the model could not take all: it is shown less of the session",
               "step messages"),
        _event("llm.called", "the model is asked", "model", "call"),
        _event("llm.delta", "a piece of the reply; live only, never stored", "call offset text",
               "attempt"),
        _event("llm.succeeded", "the model has replied", "model", "call _metrics"),
        _event("llm.failed", "the model has not replied", "model", "call _metrics error error_details"),
        _event("llm.retrying", "the model's server failed and is asked again in a moment",
               "code delay_ms attempt", "error model call"),
        _event("usage.updated", "what the run has used so far", "usage"),
        _event("tool.called", "a tool is called", "tool_id params", "call_id"),
        _event("tool.succeeded", "a tool has answered", "tool_id result", "executor_metadata call_id"),
        _event("tool.failed", "a tool has failed", "tool_id error",
               "call_id code message type error_details"),
        _event("worker.loop_blocked", "the run held up every run of its worker", "blocked_ms stack",
               "kind name call_id agent_id plugin"),
        _event("tool.retry_requested", "a tool asks the model for other arguments",
               "tool_id attempt error", "call_id"),
        _event("validation.retry", "the answer does not fit the output_type; the model is told why",
               "attempt error"),
        _event("run.durable_idempotency_warning", "a tool whose effects must not repeat", "tool_id", "hint"),
        _event("run.checkpoint_saved", "a call's outcome is stored and will not be executed again",
               "checkpoint_id step_index", "transcript_length"),
        _event("run.resume_attempted", "the run goes on after a retryable error",
               "checkpoint_id error_type attempt_index", "error_code"),
        _event("run.resume_succeeded", "the run is back where it was", "checkpoint_id attempt_index"),
        _event("replay.prompt_changed", "a recorded reply was given to another prompt than before",
               "call_id model", "recorded_digest digest"),
        _event("run.resume_exhausted", "no more retries", "attempt_index error_type limit", "error_code"),
        _event("budget.cost_skipped", "the cost limit cannot be watched: no price is known", "limit reason"),
        _event("memory.writeback.started", "the memory keeps what it wants of the run"),
        _event("memory.writeback_succeeded", "the memory has kept it"),
        _event("memory.writeback.completed", "the memory is done"),
        _event("memory.writeback_failed", "the memory could not keep it", "error", "error_details"),
        _event("memory.compact.started", "the memory may shorten itself"),
        _event("memory.compact_succeeded", "the memory has shortened itself"),
        _event("memory.compact.completed", "the memory is done"),
        _event("memory.compact_failed", "the memory stays as it is", "error", "error_details"),
        # a run's end
        _event("run.completed", "the run has an answer", "result"),
        _event("run.failed", "the run has ended without an answer", "error", "error_details"),
        _event("run.cancelled", "the run was ended from outside", "", "reason"),
        _event("session.run.completed",
               "the last event of a life; duration_ms: how long workers have worked on the run, over all "
               "attempts, without the time in which it waited", "stop_reason", "duration_ms"),
        # told to a watcher, not stored
        _event("events.gap", "the events from..to were trimmed and cannot be shown", "from to"),
    )
}  # fmt: skip

TERMINAL_EVENTS = frozenset({"run.completed", "run.failed", "run.cancelled"})
"""Exactly one of them ends each life of a run; `session.run.completed`, marked final, follows it."""

LIVE_ONLY_EVENTS = frozenset({"llm.delta", "events.gap"})
"""They have no `seq` and are in no replay."""

_FAMILIES = frozenset(name.split(".")[0] for name in EVENT_SCHEMAS)


class RunEvent(BaseModel):
    """One event of a run, as it is stored and published.

    `seq` counts the stored events of a run from 1 without gaps; None: live only. `worker` is None when no
    worker wrote it. After the event marked `final` nothing more comes in this life.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer writer may add to the envelope

    name: str
    seq: int | None = Field(ge=1)
    run_id: str
    session_id: str
    agent_id: str
    life: int = Field(ge=1)
    attempt: int = Field(ge=0)
    worker: str | None = None
    timestamp: datetime
    payload: dict[str, JsonValue] = Field(default_factory=dict)
    final: bool = False

    @property
    def is_terminal(self) -> bool:
        return self.name in TERMINAL_EVENTS

    @classmethod
    def from_json(cls, text: bytes | str) -> Self:
        """The event that `to_json()` wrote. Raises pydantic's `ValidationError` on anything else."""
        return cls.model_validate_json(text)

    def to_json(self) -> str:
        """The envelope in one line; `final` stands in it only when true."""
        return self.model_dump_json(exclude=None if self.final else {"final"})


def check_event(name: str, payload: Mapping[str, Any]) -> list[str]:
    """What is wrong with an event: an undeclared name in one of our families, or missing keys.

    An application's own names (`order.shipped`) are its own business.

    >>> check_event("tool.called", {"tool_id": "calc"})
    ["tool.called: 'params' is missing"]
    """
    schema = EVENT_SCHEMAS.get(name)
    if schema is not None:
        return [f"{name}: {key!r} is missing" for key in schema.required if key not in payload]
    return [f"{name}: not declared{_guess(name, EVENT_SCHEMAS)}"] if name.split(".")[0] in _FAMILIES else []


def _guess(name: str, known: Iterable[str]) -> str:
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""
