"""Exporters and their reports: the only place that defines what an exporter gets of a run.

A report has ids, names, counts, times and the error of a run. It has no prompt, answer, argument or result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace
from typing import Any, Protocol

from openagents_worker.agents.plugin import Plugin
from openagents_worker.models import RunResult

__all__ = [
    "CallReport",
    "DiagnosticsExporter",
    "ReportExporter",
    "LLMCallMetrics",
    "NullExporter",
    "OriginalExporter",
    "RunReport",
    "exporter_of",
]


@dataclass(frozen=True, slots=True)
class LLMCallMetrics:
    """One model call, with the names of the original SDK. Times are in milliseconds.

    `attempt` counts how often the call was begun. `error` is the code of its error.
    """

    model: str
    latency_ms: float
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    ttft_ms: float | None = None
    attempt: int = 1
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CallReport:
    """A call of a model (`metrics`) or of a tool. `error` is the code of its error."""

    call_id: str
    kind: str
    name: str
    began_at: datetime
    ended_at: datetime
    metrics: LLMCallMetrics | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RunReport:
    """A life of a run that has ended. `key` is the same each time when this life is exported."""

    key: str
    agent_id: str
    session_id: str
    result: RunResult[Any]
    began_at: datetime
    ended_at: datetime
    calls: tuple[CallReport, ...] = ()
    attempts: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def error_snapshot(self) -> Mapping[str, Any] | None:
        """The error snapshot of a failed run: type, code, message and tool calls."""
        snapshot = self.result.metadata.get("error_snapshot")
        return snapshot if isinstance(snapshot, dict) else None


class ReportExporter(Protocol):
    """What gets the reports; see `DiagnosticsExporter`."""

    def export(self, report: RunReport) -> None: ...


class DiagnosticsExporter(Plugin):
    """Base class of exporters. `Config` checks the `config` object of `diagnostics` in the agents file.

    `export` is called in a thread of its own, for one run after the other, after the end of the run is
    stored. It cannot slow or fail a run. After an exception the report comes again, so a report can arrive
    twice: with the same `key`.
    """

    def export(self, report: RunReport) -> None:
        """Send the report. Any exception means a new try."""
        raise NotImplementedError


class NullExporter(DiagnosticsExporter):
    """Exports nothing. `error_snapshot_last_n` and `redact_keys` have their effect nevertheless."""

    def export(self, report: RunReport) -> None:
        """Nothing is sent."""


class OriginalExporter:
    """An exporter written for the original SDK: `record_llm_call` and `on_run_complete`."""

    def __init__(self, plugin: Any) -> None:
        self._plugin = plugin

    def export(self, report: RunReport) -> None:
        record = getattr(self._plugin, "record_llm_call", None)
        for call in report.calls:
            if record is not None and call.metrics is not None:
                record(report.result.run_id, call.metrics)
        snapshot = report.error_snapshot
        ids = {"agent_id": report.agent_id, "session_id": report.session_id}
        self._plugin.on_run_complete(
            report.result.model_copy(deep=True),
            None if snapshot is None else SimpleNamespace(**ids, traceback=_traceback(report), **snapshot),
        )


def _traceback(report: RunReport) -> str:
    details = report.result.error_details
    return (details.traceback if details is not None else None) or ""


def exporter_of(plugin: Any) -> ReportExporter:
    """The plugin as an exporter. One that is written for the original SDK has no `export`."""
    exporter: ReportExporter = plugin if hasattr(plugin, "export") else OriginalExporter(plugin)
    return exporter
