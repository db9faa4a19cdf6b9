"""The output of `show`. The only place that formats one run and one of its calls."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from openagents_worker.arguments import text_of_caller
from openagents_worker.cli.call_text import call_text, duration_or_dash, tokens_and_cost
from openagents_worker.cli.display import STATE_COLOURS, error_lines, short, usage_text
from openagents_worker.cli.terminal import Safe, columns, joined, styled, table
from openagents_worker.models import RunRecord, RunUsage
from openagents_worker.producer.call_names import short_call_id
from openagents_worker.producer.run_summary import (
    AttemptSummary,
    CallSummary,
    RunSummary,
    summarize_events,
)
from openagents_worker.producer.time_text import clock_time, duration_text
from openagents_worker.producer.waiting_reason import WaitingReason, read_waiting_reason
from openagents_worker.store.client import Store
from openagents_worker.store.records import read_record
from openagents_worker.store.stored_events import history

__all__ = ["RunDetails", "call_lines", "read_run_details"]

INPUT_CHARS = 400


@dataclass(frozen=True, slots=True)
class RunDetails:
    """A snapshot of a run: its record, the summary of its events, and why it waits."""

    record: RunRecord
    summary: RunSummary
    waiting: WaitingReason | None

    def to_json(self) -> dict[str, Any]:
        """The fields of the record, and `attempts`, `calls`, `queue_wait_ms` and `waiting_for`."""
        return {
            **self.record.model_dump(mode="json"),
            "queue_wait_ms": self.summary.waited_ms,
            "waiting_for": None if self.waiting is None else asdict(self.waiting),
            "attempts": [attempt.to_json() for attempt in self.summary.attempts],
            "calls": [call.to_json() for call in self.summary.calls],
        }

    def lines(self) -> list[Safe]:
        """The snapshot as text."""
        rows = [*self._identity_rows(), *self._input_and_answer(), *self._time_and_usage_rows()]
        lines = [joined(f"{name:<9}", " ", text) for name, text in rows]
        if not self.summary.is_whole:
            lines.append(styled("the first events were trimmed: attempts and steps may be missing", dim=True))
        if self.summary.attempts:
            lines += [Safe(""), *self._attempts()]
        if self.summary.calls:
            lines += [Safe(""), *self._steps()]
        result = self.record.result
        if result is not None and result.error_details is not None:
            lines += [Safe(""), *error_lines(result.stop_reason, result.error_details)]
        return lines

    def _identity_rows(self) -> list[tuple[str, str]]:
        record = self.record
        state = styled(record.state, fg=STATE_COLOURS.get(record.state), bold=True)
        code = f" ({record.reason_code})" if record.reason_code else ""
        rows: list[tuple[str, str]] = [("run", record.run_id), ("state", joined(state, code))]
        if self.waiting is not None:
            rows.append(("waits", self.waiting.text))
        if record.cancel_requested and not record.state.is_terminal:
            rows.append(("cancel", "requested: the run ends as soon as its worker receives the request"))
        rows += [("agent", record.agent_id), ("session", record.session_id), ("queue", record.queue)]
        if record.worker:
            rows.append(("worker", record.worker))
        request = record.request
        if request is not None and request.tenant is not None:
            rows.append(("tenant", request.tenant))
        if request is not None and request.labels:
            rows.append(("labels", " ".join(f"{name}={value}" for name, value in request.labels.items())))
        if record.parent_run_id is not None:
            rows.append(("parent", record.parent_run_id))
        if record.forked_from is not None:
            rows.append(("fork of", record.forked_from))
        return rows

    def _input_and_answer(self) -> list[tuple[str, str]]:
        record = self.record
        rows = [("input", short(record.request.input_text, INPUT_CHARS))] if record.request else []
        if record.result is not None and record.result.ok:
            rows.append(("answer", short(record.result.final_output, INPUT_CHARS)))
        return rows

    def _time_and_usage_rows(self) -> list[tuple[str, str]]:
        record = self.record
        moments = (
            ("submitted", record.created_ms),
            ("started", record.started_ms),
            ("ended", record.ended_ms),
        )
        times = [f"{name} {clock_time(at_ms)}" for name, at_ms in moments if at_ms is not None]
        if self.summary.waited_ms is not None:
            times.insert(2, f"after a wait of {duration_text(self.summary.waited_ms)}")
        retries = "1 retry" if record.retries == 1 else f"{record.retries} retries"
        recoveries = "1 recovery" if record.recoveries == 1 else f"{record.recoveries} recoveries"
        return [
            ("times", ", ".join(times) or "-"),
            ("active", f"{duration_text(record.duration_ms)} in all finished attempts"),
            ("attempts", f"{record.attempt} ({retries}, {recoveries})"),
            ("steps", str(record.steps)),
            ("usage", usage_text(record.usage)),
            *_latency_rows(record.usage),
        ]

    def _attempts(self) -> list[Safe]:
        rows = [
            (
                str(one.number),
                clock_time(one.began_at.timestamp() * 1000),
                duration_or_dash(one.took_ms),
                one.worker,
                self._ending_text(one),
            )
            for one in self.summary.attempts
        ]
        header = ("ATTEMPT", "AT", "TOOK", "WORKER", "ENDED")
        return table(header, rows, flexible=("ENDED", "WORKER"), width=columns())

    def _ending_text(self, attempt: AttemptSummary) -> str:
        if attempt.ended:
            return f"{attempt.ended}: {attempt.code}" if attempt.code else attempt.ended
        return "running" if attempt.number == self.record.attempt else "unknown"

    def _steps(self) -> list[Safe]:
        rows = [
            (
                short_call_id(call.call_id),
                clock_time(call.began_at.timestamp() * 1000),
                duration_or_dash(call.took_ms),
                f"x{call.tries}" if call.tries > 1 else "",
                tokens_and_cost(call),
                call_text(call),
            )
            for call in self.summary.calls
        ]
        return table(
            ("STEP", "AT", "TOOK", "TRIES", "TOKENS", "WHAT"),
            rows,
            flexible=("WHAT", "STEP"),
            width=columns(),
        )


def read_run_details(store: Store, run_id: str) -> RunDetails:
    """Read the current state of a run. Raises `RunNotFound`."""
    text_of_caller("run_id", run_id)
    events = store.execute(history(store.keys, run_id))
    record = read_record(store, run_id)
    return RunDetails(
        record, summarize_events(events), store.execute(read_waiting_reason(store.keys, record))
    )


def call_lines(call: CallSummary, value: Any) -> list[Safe]:
    """One call as text: its arguments (cut as in its events) and its complete result `value`."""
    rows = [
        ("step", call.call_id),
        ("outcome", str(call.outcome)),
        ("at", clock_time(call.began_at.timestamp() * 1000)),
        ("took", duration_or_dash(call.took_ms)),
        ("tries", str(call.tries)),
        ("usage", ", ".join(f"{name} {number}" for name, number in call.usage.items()) or "-"),
    ]
    lines = [joined(f"{name:<9}", " ", text) for name, text in rows]
    if call.arguments is not None:
        lines += [Safe(""), styled("arguments", bold=True), joined(_indented_json(call.arguments))]
    if call.message is not None:
        lines += [Safe(""), joined(styled(f"{call.code or 'error'}", fg="red"), f": {call.message}")]
    if value is not None:
        lines += [Safe(""), styled("result", bold=True), joined(_indented_json(value))]
    return lines


def _indented_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)


def _latency_rows(usage: RunUsage) -> list[tuple[str, str]]:
    """How fast the model calls of an ended run were."""
    known = (
        ("median", usage.llm_latency_p50_ms),
        ("95 %", usage.llm_latency_p95_ms),
        ("first token", usage.ttft_ms),
    )
    texts = [f"{name} {duration_text(round(ms))}" for name, ms in known if ms is not None]
    if usage.llm_retry_count:
        texts.append(f"{usage.llm_retry_count} repeated requests")
    return [("latency", ", ".join(texts))] if texts else []
