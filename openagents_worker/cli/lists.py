"""Lists for people: runs, sessions."""

from __future__ import annotations

from collections.abc import Sequence

from openagents_worker.cli.display import STATE_COLOURS, short
from openagents_worker.cli.terminal import Safe, columns, joined, styled, table
from openagents_worker.cli.times import clock_time, span
from openagents_worker.models import RunRecord
from openagents_worker.store.listing import SessionSummary
from openagents_worker.store.records import SessionView

__all__ = ["left_nothing_line", "run_table", "session_lines", "session_table"]


def run_table(runs: Sequence[RunRecord], now_ms: int) -> list[Safe]:
    """Runs with their state, the reason, their age and what they have used."""
    rows = [
        (
            "-" if run.created_ms is None else span(now_ms - run.created_ms),
            styled(run.state, fg=STATE_COLOURS.get(run.state)),
            run.reason_code or "",
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


def session_table(sessions: Sequence[SessionSummary]) -> list[Safe]:
    """Sessions with what they hold, and who works in them."""
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
    """A session for people: what it is, and then what was said in it."""
    rows: list[tuple[str, object]] = [
        ("session", session.session_id),
        ("holder", session.holder or "-"),
        ("waiting", ", ".join(session.waiting) or "-"),
        ("bytes", f"{session.bytes:,}"),
        *(("artifact", f"{one.kind} {one.name}: {short(one.payload)}") for one in session.artifacts),
        *(("state", f"{name}: {short(value)}") for name, value in session.state.items()),
    ]
    said = [f"{message.get('role', '?')}: {short(message.get('content'))}" for message in session.transcript]
    return [joined(line) for line in [*(f"{name:<9} {value}" for name, value in rows), *said]]


def left_nothing_line(record: RunRecord) -> Safe:
    """A run that has ended and of which nothing stands in its session's transcript."""
    details = record.result.error_details if record.result else None
    why = f" ({details.code}: {short(details.message)})" if details else ""
    return styled(f"not in it: run {record.run_id} {record.state}{why}", dim=True)
