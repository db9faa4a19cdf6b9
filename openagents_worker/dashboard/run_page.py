"""The page of a run. The only place that reads everything that is known about one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.dashboard.conversation import ShownMessage, conversation_of
from openagents_worker.dashboard.page import PageHandler
from openagents_worker.dashboard.shown_text import (
    LongText,
    cost_text,
    count_text,
    long_text,
    ms_of,
    now_ms,
    short_text,
    time_text,
    took_text,
)
from openagents_worker.dashboard.timeline import Row, Timeline, timeline_of
from openagents_worker.errors import OpenAgentsError
from openagents_worker.events import EVENT_SCHEMAS, RunEvent
from openagents_worker.models import Approval, ErrorDetails, RunRecord, RunState
from openagents_worker.models.waiting import WaitKind
from openagents_worker.producer.call_names import short_call_id
from openagents_worker.producer.client import AsyncClient
from openagents_worker.producer.run_summary import RunSummary, summarize_events
from openagents_worker.producer.waiting_reason import read_waiting_reason
from openagents_worker.store.checkpoints import Checkpoint, newest_checkpoints
from openagents_worker.store.row_reads import ReadBy
from openagents_worker.store.stored_events import newest_events

__all__ = ["RunPage", "RunView", "approval_forms", "read_run"]

MAX_EVENTS = 2_000  # that are read; a longer run shows its end
SHOWN_EVENTS = 100
MAX_STEPS = 100  # of the conversation
MAX_APPROVALS = 20
TRACEBACK_CHARS = 8_000
QUESTION_CHARS = 240
LIMITS = (
    ("max_steps", "Steps"),
    ("max_tool_calls", "Tool calls"),
    ("max_cost_usd", "Cost in USD"),
    ("max_total_tokens", "Tokens"),
    ("max_duration_ms", "Time of work in milliseconds"),
)
"""The limits that the form extends: field and label."""
HIDDEN_FIELDS = frozenset({"error_details", "_metrics", "agent_id", "session_id", "run_id"})
"""Fields of a payload that the page shows elsewhere."""


@dataclass(frozen=True, slots=True)
class ShownError:
    """The error of a run. `place` is the call that failed."""

    code: str
    message: LongText
    hint: str
    traceback: LongText
    place: str
    causes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunView:
    """Everything that the page shows of a run."""

    record: RunRecord
    question: str
    facts: tuple[tuple[str, str], ...]
    error: ShownError | None
    waits: str
    timeline: Timeline
    read_events: int
    messages: tuple[ShownMessage, ...]
    no_messages: str
    left_out_steps: int
    events: tuple[tuple[RunEvent, str, str], ...]
    last_seq: int
    approvals: tuple[tuple[Approval, LongText], ...]
    more_approvals: int
    unknown: tuple[tuple[str, str], ...]


class RunPage(PageHandler):
    """A run: why it failed or waits, its timeline, its conversation and its events."""

    async def get(self, run_id: str) -> None:
        view = await read_run(self.client, run_id)
        self.show("run.html", run=view, record=view.record, names=sorted(EVENT_SCHEMAS), limits=LIMITS)


async def read_run(client: AsyncClient, run_id: str) -> RunView:
    """Read a run. Raises `RunNotFound`."""
    store = client.store
    record = await client.record(run_id)
    events = await store.execute(newest_events(store.keys, run_id, MAX_EVENTS))
    reason = await store.execute(read_waiting_reason(store.keys, record, ReadBy.SCRIPT))
    checkpoints, problem = await _checkpoints(client, record)
    pending = await client.handle(run_id).approvals() if record.state is RunState.AWAITING_APPROVAL else []
    summary = summarize_events(events)
    checkpoint_of = {each.call: each.checkpoint_id for each in checkpoints}
    timeline = timeline_of(record, events, summary, checkpoint_of, now_ms())
    return RunView(
        record,
        short_text(record.request.input_text, QUESTION_CHARS) if record.request is not None else "",
        tuple(_facts(record, summary)),
        _error(record, timeline.rows),
        reason.text if reason is not None else "",
        timeline,
        len(events),
        tuple(conversation_of(record, checkpoints)),
        problem,
        max(0, record.steps - len(checkpoints)) if not problem else 0,
        tuple(_shown_events(events)),
        events[-1].seq or 0 if events else 0,
        approval_forms(pending[:MAX_APPROVALS]),
        max(0, len(pending) - MAX_APPROVALS),
        tuple((wait.call_id, wait.name) for wait in record.waiting if wait.kind is WaitKind.OUTCOME),
    )


async def _checkpoints(client: AsyncClient, record: RunRecord) -> tuple[Sequence[Checkpoint], str]:
    """The last checkpoints, or why they cannot be read: a user who only watches may not read them."""
    try:
        return await client.store.execute(newest_checkpoints(client.store.keys, record, MAX_STEPS)), ""
    except OpenAgentsError as error:
        return (), f"{error.code}: {error.message}"


def approval_forms(pending: Sequence[Approval]) -> tuple[tuple[Approval, LongText], ...]:
    """The calls that wait for an approval, each with its arguments as JSON."""
    return tuple((each, long_text(each.arguments)) for each in pending)


def _facts(record: RunRecord, summary: RunSummary) -> list[tuple[str, str]]:
    """The figures at the head of the page."""
    usage, request = record.usage, record.request
    now = now_ms()
    total = (record.ended_ms or now) - record.created_ms if record.created_ms else None
    facts = [
        ("Submitted", time_text(record.created_ms)),
        ("Total time", took_text(total)),
        ("Worked", took_text(record.duration_ms)),
        ("Waited first", took_text(summary.waited_ms)),
        ("Model calls", f"{usage.llm_calls:,}"),
        ("Tool calls", f"{usage.tool_calls:,}"),
        ("Tokens", f"{usage.input_tokens:,} + {usage.output_tokens:,}"),
        ("Cost", cost_text(usage.cost_usd)),
        ("Attempts", _attempts_text(record)),
        ("Steps", f"{record.steps:,}"),
        ("Queue", record.queue),
    ]
    if record.worker:
        facts.append(("Worker", short_text(record.worker)))
    if record.life > 1:
        facts.append(("Life", str(record.life)))
    if record.forked_from:
        facts.append(("Fork of", short_text(record.forked_from)))
    if request is not None and request.tenant is not None:
        facts.append(("Tenant", short_text(request.tenant)))
    if request is not None and request.labels:
        labels = ", ".join(f"{name}={value}" for name, value in request.labels.items())
        facts.append(("Labels", short_text(labels, 300)))
    return facts


def _attempts_text(record: RunRecord) -> str:
    parts = []
    if record.retries:
        parts.append(count_text(record.retries, "retry"))
    if record.recoveries:
        parts.append(count_text(record.recoveries, "recovery"))
    return f"{record.attempt} ({', '.join(parts)})" if parts else str(record.attempt)


def _error(record: RunRecord, rows: Sequence[Row]) -> ShownError | None:
    """Why the run failed, or the error for which it is retried."""
    result = record.result
    details = result.error_details if result is not None else None
    if details is None and record.state is RunState.RETRYING:
        details = record.last_error
    if details is None and result is not None and not result.ok and record.state is RunState.FAILED:
        details = ErrorDetails(code=result.stop_reason, message=f"the run ended as {result.stop_reason}")
    if details is None:
        return None
    failed = [row for row in rows if row.tone == "bad" and row.kind in ("model", "tool", "step")]
    place = f"{failed[-1].kind} {failed[-1].title}" if failed else ""
    return ShownError(
        details.code,
        long_text(details.message, 2_000),
        details.hint or "",
        long_text(details.traceback, TRACEBACK_CHARS),
        place,
        tuple(_causes(details)),
    )


def _causes(details: ErrorDetails) -> list[str]:
    found, cause = [], details.cause
    while cause is not None:
        if cause.message != details.message:  # an error of your code repeats the message of its cause
            found.append(short_text(f"{cause.code}: {cause.message}", 400))
        cause = cause.cause
    return found


def _shown_events(events: Sequence[RunEvent]) -> list[tuple[RunEvent, str, str]]:
    """The newest events, newest first: each with its time and its payload on one line."""
    return [
        (event, time_text(ms_of(event.timestamp)), short_text(_payload(event), 300))
        for event in reversed(events[-SHOWN_EVENTS:])
    ]


def _payload(event: RunEvent) -> dict[str, Any]:
    return {
        name: short_call_id(value) if name == "call_id" and isinstance(value, str) else value
        for name, value in event.payload.items()
        if name not in HIDDEN_FIELDS
    }
