"""Lists of runs and sessions. The only place that formats them as text."""

from __future__ import annotations

from collections.abc import Sequence

from openagents_worker.cli.display import STATE_COLOURS, short
from openagents_worker.cli.terminal import Safe, columns, joined, styled, table
from openagents_worker.llm.messages import readable_text
from openagents_worker.models import Approval, RunRecord
from openagents_worker.producer.call_names import short_call_id
from openagents_worker.producer.time_text import age_text, clock_time
from openagents_worker.producer.waiting_reason import short_reason
from openagents_worker.store.fleet import WorkerInfo
from openagents_worker.store.listing import SessionSummary
from openagents_worker.store.sessions import SessionView

__all__ = ["approval_table", "missing_run_line", "run_table", "session_lines", "session_table"]


def run_table(
    runs: Sequence[RunRecord], now_ms: int, workers: Sequence[WorkerInfo] | None = None
) -> list[Safe]:
    """A table of runs: age, state, reason, ids and used tokens. `now_ms` is the time of Redis.

    `workers` are those of `read_workers_for`. Without them, the reason of a queued run is not said.
    """
    rows = [
        (
            "-" if run.created_ms is None else age_text(now_ms - run.created_ms),
            styled(run.state, fg=STATE_COLOURS.get(run.state)),
            short_reason(run, workers),
            run.run_id,
            run.agent_id,
            run.session_id,
            f"{run.usage.input_tokens + run.usage.output_tokens:,}",
        )
        for run in runs
    ]
    return table(
        ("AGE", "STATE", "REASON", "RUN", "AGENT", "SESSION", "TOKENS"),
        rows,
        flexible=("SESSION", "AGENT", "REASON"),
        width=columns(),
    )


def approval_table(approvals: Sequence[Approval]) -> list[Safe]:
    """A table of the calls that wait for an approval."""
    rows = [
        (
            clock_time(one.requested_at.timestamp() * 1000),
            clock_time(one.expires_at.timestamp() * 1000) if one.expires_at else "-",
            one.run_id,
            short_call_id(one.call_id),
            one.agent_id,
            short(one.arguments),
        )
        for one in approvals
    ]
    return table(
        ("ASKED", "EXPIRES", "RUN", "CALL", "AGENT", "ARGUMENTS"),
        rows,
        flexible=("ARGUMENTS", "AGENT"),
        width=columns(),
    )


def session_table(sessions: Sequence[SessionSummary]) -> list[Safe]:
    """A table of sessions: last run, sizes, and the run that each session executes now."""
    rows = [
        (
            clock_time(one.last_run_ms),
            one.session_id,
            str(one.messages),
            str(one.artifacts),
            f"run {one.holder}" if one.holder else "idle",
            str(one.waiting or ""),
        )
        for one in sessions
    ]
    return table(
        ("LAST RUN", "SESSION", "MESSAGES", "ARTIFACTS", "BUSY WITH", "WAITING"),
        rows,
        flexible=("BUSY WITH", "SESSION"),
        width=columns(),
    )


def session_lines(session: SessionView) -> list[Safe]:
    """A session as text: its fields, its artifacts, its state, then the messages of its transcript."""
    rows: list[tuple[str, object]] = [
        ("session", session.session_id),
        ("holder", session.holder or "-"),
        ("waiting", ", ".join(session.waiting) or "-"),
        ("bytes", f"{session.bytes:,}"),
        *(("artifact", f"{one.kind} {one.name}: {short(one.payload)}") for one in session.artifacts),
        *(("state", f"{name}: {short(value)}") for name, value in session.state.items()),
    ]
    if (summary := session.summary) is not None:
        rows.append(("summary", f"of the first {summary.messages} messages: {short(summary.text)}"))
    messages = [
        f"{message.get('role', '?')}: {short(readable_text(message.get('content')))}"
        for message in session.transcript
    ]
    return [joined(line) for line in [*(f"{name:<9} {value}" for name, value in rows), *messages]]


def missing_run_line(record: RunRecord) -> Safe:
    """The line for a run that has ended without an entry in the transcript of its session."""
    details = record.result.error_details if record.result else None
    why = f" ({details.code}: {short(details.message)})" if details else ""
    return styled(f"not in the transcript: run {record.run_id} {record.state}{why}", dim=True)
