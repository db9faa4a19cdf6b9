"""The exporter `rich`: a report as a person sees it in a terminal."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from rich.console import Console

from openagents_worker.diagnostics.base import RunReport
from openagents_worker.diagnostics.console import RichExporter
from openagents_worker.models import RunResult, StopReason

EXECUTED = "\x1b\x07\x9b\u202e\u2028"
CONTROLS = "\x1b]52;c;cm0gLXJm\x07\x1b[2J\x9b1A\u202eabc\u2028"


def printed(report: RunReport) -> str:
    exporter, stream = RichExporter(), io.StringIO()
    exporter._console = Console(file=stream, width=200, force_terminal=True, color_system=None)
    exporter.export(report)
    return stream.getvalue()


@pytest.mark.parametrize("text", [CONTROLS, "[red]not a style[/red]"])
def test_a_report_is_text_whatever_is_in_it(text: str) -> None:
    """A model or a tool may have written the error. A terminal would execute its control sequences."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    snapshot = {"error_code": "tool.error", "error_message": text, "tool_call_chain": [{"tool_id": text}]}
    result = RunResult(run_id="r1", stop_reason=StopReason.FAILED, metadata={"error_snapshot": snapshot})
    report = RunReport("r1", "a", "s1", result, now, now)

    shown = printed(report)

    assert not set(EXECUTED) & set(shown)
    assert "tool.error" in shown
    if text != CONTROLS:
        assert text in shown
