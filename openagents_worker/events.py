"""Events. The only place that defines the events, their payloads and their JSON form.

Names and payloads are those of the original SDK, with additions. The envelope contains the ids of run,
session and agent, so payloads do not repeat them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from openagents_worker.suggest import guess

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
    """The guaranteed payload of the events of one name: `required` keys are always present."""

    name: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    description: str = ""


def _event(name: str, description: str, required: str = "", optional: str = "") -> EventSchema:
    return EventSchema(name, tuple(required.split()), tuple(optional.split()), description)


EVENT_SCHEMAS: Mapping[str, EventSchema] = {
    schema.name: schema
    for schema in (
        # the states of a run
        _event("run.queued", "the run waits for a worker; `workers` is 0 if no worker consumes the queue", "",
               "queue workers hint"),
        _event("run.scheduled", "the run was accepted, and is due later", "due_at", "delay_ms"),
        _event("run.waiting_session", "the run waits for an earlier run of its session", "", "position"),
        _event("run.attempt_started", "a worker has claimed the run", "", "checkpoint_id attempt"),
        _event("run.resumed", "a run that had ended continues in a new life", "", "checkpoint_id life by"),
        _event("run.retry_scheduled", "a retryable error occurred; the run is retried later",
               "due_at delay_ms error_code", "attempt_index error error_details"),
        _event("run.recovered", "the worker of the run has died; the run is queued again. `alone`: the run "
               "may have killed it, and is executed alone if a process without other runs is found in time",
               "previous_worker", "age_ms recoveries alone"),
        _event("run.handed_over", "the worker of the run is stopping; the run is queued again",
               "", "previous_worker"),
        _event("run.left_to_others", "a worker cannot execute the run (format, agent); it is left to others",
               "left_by delay_ms", "format newest_read error_code"),
        _event("run.waiting", "the run is parked until one of these waits ends, and holds no slot",
               "waiting due_at"),
        _event("run.woken", "the parked run continues: this wait has ended", "kind", "name call_id"),
        _event("signal.received", "the run has received a value that was sent to it", "name", "call_id"),
        _event("run.poisoned", "the run killed too many workers, or was released too often, without a commit",
               "recoveries", "limit"),
        _event("run.cancel_requested", "the cancellation of the run was requested, by a user or by another "
               "run of the session (`mode`: interrupt or rollback)", "", "reason mode by_run_id"),
        _event("run.budget_exceeded", "a limit of the budget is used up, and the run waits for an extension",
               "kind limit current"),
        _event("run.budget_extended", "the run has taken an extension of its budget", "budget by"),
        _event("run.steered", "the run has taken a message that was sent to it while it worked", "text by"),
        _event("run.forked", "the run continues from a checkpoint of another run; calls that had begun there "
               "are not known to it", "from_run_id checkpoint_id", "dropped_intents"),
        _event("run.child_started", "the run has delegated to another agent, or its child begins a new life",
               "child_run_id agent_id mode call_id", "background"),
        _event("run.child_completed", "a child of the run has ended", "child_run_id stop_reason call_id"),
        _event("worker.false_alarm", "the worker was declared dead but is alive; the recovery does not count",
               "alive seen_by"),
        # the execution of a run
        _event("run.requested", "the first attempt of the run begins", "input_text"),
        _event("session.run.started", "the run occupies its session", "", "input_text"),
        _event("run.validated", "agent, plugins and model were found"),
        _event("session.acquired", "the run holds the session"),
        _event("context.compact.started", "the context assembler may shorten the transcript"),
        _event("context.compact_succeeded", "the context assembler has shortened the transcript"),
        _event("context.compact.completed", "`compact` is finished; the size of the transcript",
               "", "transcript_size duration_ms"),
        _event("context.compact_failed", "the transcript was not shortened", "error", "error_details"),
        _event("context.assemble.started", "the context assembler begins"),
        _event("context.assemble.completed", "the context assembler has selected what the run sees",
               "transcript_size",
               "artifact_count duration_ms counted_by tokens omitted_messages"),
        _event("tool.preflight", "the result of a tool's own check before the run",
               "tool_id result", "duration_ms error"),
        _event("tool.mcp.connect", "a connection to an MCP server was opened", "tool_id server mode"),
        _event("context.created", "pattern, tools and model are bound to the run"),
        _event("memory.inject.started", "`inject` of the memory begins"),
        _event("memory.injected", "`inject` of the memory has succeeded"),
        _event("memory.inject.completed", "`inject` of the memory is finished", "", "view_size"),
        _event("memory.inject_failed", "`inject` of the memory has failed", "error", "error_details"),
        _event("pattern.phase", "the pattern enters another phase", "phase"),
        _event("pattern.plan_created", "the model has made a plan", "plan"),
        _event("pattern.step_started", "a step begins; steps are counted from 1", "step", "plan_step"),
        _event("pattern.step_finished", "a step has ended", "step action"),
        _event("pattern.past_shortened", "the request was too long; the model sees less of the session",
               "step messages"),
        _event("llm.called", "a model call begins", "model", "call"),
        _event("llm.delta", "a piece of a streamed reply", "call offset text",
               "attempt kind tool_call tool_name"),
        _event("llm.succeeded", "a model call has succeeded", "model",
               "call _metrics output_text tool_calls finish_reason request_id answered_by"),
        _event("llm.failed", "a model call has failed", "model",
               "call _metrics error error_details request_id"),
        _event("llm.retrying", "a request to the model failed and is repeated after `delay_ms`",
               "code delay_ms attempt", "error model call request_id"),
        _event("llm.limited", "a request to the model waits for a limit of the fleet; if it has to wait for "
               "more than a second, the run is parked", "key delay_ms", "model call"),
        _event("llm.fallback", "a model cannot answer; the call continues with the next model in "
               "`llm.fallbacks`", "code model fallback", "error call request_id"),
        _event("llm.price_unknown", "a price of a model is not known, so the call has no cost; `parts` says "
               "for what, such as `web_search`; sent once for each model", "model", "call parts"),
        _event("usage.updated", "the usage of the run so far", "usage"),
        _event("tool.called", "a tool call begins; again only if the tool is executed again",
               "tool_id params", "call_id"),
        _event("tool.succeeded", "a tool call has succeeded", "tool_id result",
               "executor_metadata call_id streamed"),
        _event("tool.delta", "a piece of the output of a tool that is still working", "call_id offset text",
               "attempt"),
        _event("tool.failed", "a tool call has failed", "tool_id error",
               "call_id code message type error_details executor_metadata streamed"),
        _event("worker.loop_blocked", "the run blocked the event loop of its worker", "blocked_ms stack",
               "kind name call_id agent_id plugin"),
        _event("tool.background.submitted", "a tool has started a job in the background of a service",
               "tool_id call_id job_id"),
        _event("tool.background.polled", "the state of a job in the background; the run waits for its end",
               "tool_id call_id job_id status", "progress error"),
        _event("tool.background.completed", "a job in the background has ended",
               "tool_id call_id job_id status"),
        _event("tool.background.abandoned", "the run ends before a job in the background; a worker cancels "
               "the job",
               "call_id"),
        _event("tool.approval_needed", "a tool call waits until somebody approves it",
               "tool_id call_id params", "reason expires_at default_action"),
        _event("tool.approved", "a tool call was approved; `arguments` replace those of the model",
               "call_id by", "note arguments action at"),
        _event("tool.denied", "a tool call was denied, or nobody decided in time", "call_id by",
               "note action at"),
        _event("run.outcome_unknown", "a tool call was interrupted, and the run waits for a decision",
               "tool_id call_id"),
        _event("tool.outcome_resolved", "somebody has decided about a call that was interrupted",
               "call_id action", "by at tool_id note"),
        _event("step.started", "a recorded function is called; again only if it is executed again", "name",
               "call_id params"),
        _event("step.succeeded", "a recorded function has returned", "name", "call_id result"),
        _event("step.failed", "a recorded function has failed", "name error",
               "call_id code message type error_details"),
        _event("tool.retry_requested", "a tool asks the model for other arguments",
               "tool_id attempt error", "call_id"),
        _event("validation.retry", "the answer does not match the `output_type`; the model gets the reason",
               "attempt error"),
        _event("tool.batch.started", "several tool calls begin together",
               "batch_id concurrent_count tool_ids"),
        _event("tool.batch.completed", "all tool calls of a batch have ended",
               "batch_id successes failures"),
        _event("run.durable_idempotency_warning", "a tool is called whose effect must not be repeated",
               "tool_id", "hint"),
        _event("run.checkpoint_saved", "the outcome of a call is stored; the call is never made again",
               "checkpoint_id step_index", "transcript_length call_id"),
        _event("run.resume_attempted", "the run continues after a retryable error",
               "checkpoint_id error_type attempt_index", "error_code"),
        _event("run.resume_succeeded", "the run is prepared again after a retry",
               "checkpoint_id attempt_index"),
        _event("replay.prompt_changed", "a recorded reply was used for a changed prompt",
               "call_id model", "recorded_digest digest"),
        _event("run.resume_exhausted", "the last retry has failed",
               "attempt_index error_type limit", "error_code"),
        _event("budget.cost_skipped", "the cost limit cannot be checked, because no price is known",
               "limit reason"),
        _event("memory.writeback.started", "`writeback` of the memory begins"),
        _event("memory.writeback_succeeded", "`writeback` of the memory has succeeded"),
        _event("memory.writeback.completed", "`writeback` of the memory is finished"),
        _event("memory.writeback_failed", "`writeback` of the memory has failed", "error", "error_details"),
        _event("memory.compact.started", "`compact` of the memory begins"),
        _event("memory.compact_succeeded", "`compact` of the memory has succeeded"),
        _event("memory.compact.completed", "`compact` of the memory is finished"),
        _event("memory.compact_failed", "`compact` of the memory has failed", "error", "error_details"),
        # the end of a run
        _event("run.completed", "the run has completed", "result"),
        _event("run.failed", "the run has failed", "error", "error_details"),
        _event("run.cancelled", "the run was cancelled", "", "reason"),
        _event("session.run.completed",
               "the last event of a life; `duration_ms` is the sum of all attempts, without waiting times",
               "stop_reason", "duration_ms"),
        # sent to a watcher, not stored
        _event("events.gap", "the events `from` to `to` were trimmed", "from to"),
    )
}  # fmt: skip

TERMINAL_EVENTS = frozenset({"run.completed", "run.failed", "run.cancelled"})
"""Exactly one of them ends each life of a run. `session.run.completed`, which is marked final, follows."""

LIVE_ONLY_EVENTS = frozenset({"llm.delta", "tool.delta", "events.gap"})
"""Events without a `seq`. They are never replayed."""

_FAMILIES = frozenset(name.split(".")[0] for name in EVENT_SCHEMAS)


class RunEvent(BaseModel):
    """One event of a run, as it is stored and published.

    `seq` counts the stored events of a run from 1 without gaps. It is None for an event that is only sent
    live. `worker` is None if no worker wrote the event. The event marked `final` is the last one of a life.
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
        """The event that `to_json()` wrote. Raises pydantic's `ValidationError` for any other text."""
        return cls.model_validate_json(text)

    def to_json(self) -> str:
        """The event as one line of JSON; `final` is included only if it is true."""
        return self.model_dump_json(exclude=None if self.final else {"final"})


def check_event(name: str, payload: Mapping[str, Any]) -> list[str]:
    """The mistakes of an event: missing payload keys, or an undeclared name that begins like one of ours.

    Other names, such as an application's `order.shipped`, are not checked.

    >>> check_event("tool.called", {"tool_id": "calc"})
    ["tool.called: 'params' is missing"]
    """
    schema = EVENT_SCHEMAS.get(name)
    if schema is not None:
        return [f"{name}: {key!r} is missing" for key in schema.required if key not in payload]
    if name.split(".")[0] not in _FAMILIES:
        return []
    question = guess(name, EVENT_SCHEMAS)
    return [f"{name}: not declared{question and f'; {question}'}"]
