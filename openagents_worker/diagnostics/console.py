"""The exporter `rich`: the only place that prints a report, for a person at a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from openagents_worker.diagnostics.base import DiagnosticsExporter, RunReport
from openagents_worker.printable import printable

__all__ = ["RichExporter"]


class RichExporter(DiagnosticsExporter):
    """Prints each run to stderr: a table of its usage, and for a failed run its error and its tool calls."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self._console = Console(stderr=True)

    def export(self, report: RunReport) -> None:
        usage, snapshot = report.result.usage, report.error_snapshot
        rows: dict[str, object] = {
            "agent": report.agent_id,
            "session": report.session_id,
            "stop reason": report.result.stop_reason.value,
            "llm_calls": usage.llm_calls,
            "tokens in/out": f"{usage.input_tokens} / {usage.output_tokens}",
            "latency p50": _ms(usage.llm_latency_p50_ms),
            "latency p95": _ms(usage.llm_latency_p95_ms),
            "retries": usage.llm_retry_count,
        }
        if snapshot is not None:
            rows["error"] = f"{snapshot.get('error_code')}: {snapshot.get('error_message')}"
            chain = snapshot.get("tool_call_chain") or []
            rows["tool calls"] = " -> ".join(str(call.get("tool_id")) for call in chain) or "(none)"
        table = Table(title=Text(printable(f"run {report.result.run_id}")), show_header=False)
        for name, value in rows.items():
            table.add_row(Text(name, style="bold"), Text(printable(str(value))))
        self._console.print(table)


def _ms(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f} ms"
