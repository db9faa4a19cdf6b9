"""Labels in the traces of exporters: they hide nothing of the report, and are all there."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from openagents_worker.diagnostics.base import RunReport
from openagents_worker.diagnostics.langfuse import LangfuseExporter
from openagents_worker.diagnostics.otlp import OtlpExporter
from openagents_worker.diagnostics.phoenix import PhoenixExporter
from openagents_worker.models import RunResult

AT = datetime(2026, 1, 2, tzinfo=UTC)
LANGFUSE = {"public_key": "pk", "secret_key": "the-key-of-this-test", "host": "http://127.0.0.1:1"}
METADATA = "langfuse.trace.metadata."


def report(**labels: str) -> RunReport:
    return RunReport("r1", "shop", "s1", RunResult(run_id="r1"), AT, AT, attempts=1, labels=labels)


@pytest.fixture(params=["langfuse", "phoenix"])
def exporter(request: pytest.FixtureRequest) -> OtlpExporter:
    if request.param == "langfuse":
        return LangfuseExporter(LANGFUSE)
    return PhoenixExporter({"endpoint": "http://127.0.0.1:1"})


def test_a_label_replaces_no_attribute(exporter: OtlpExporter) -> None:
    """Whatever its name: also that of an attribute, with and without the beginning of metadata."""
    plain = exporter.of_run(report())
    names = [name for key in plain for name in (key, key.removeprefix(METADATA))]

    with_labels = exporter.of_run(report(**dict.fromkeys(names, "a label")))

    assert {key: with_labels[key] for key in plain} == plain
    assert list(with_labels.values()).count("a label") == len(set(names))


def test_labels_in_langfuse_are_metadata() -> None:
    """Under their names, or behind `label.` if the name is taken; no two of them share a key."""
    exporter = LangfuseExporter(LANGFUSE)
    labels = {"team": "blue", "run_id": "theirs", "label.run_id": "x", "error_code": "none"}

    shown = exporter.of_run(report(**labels))

    assert shown[f"{METADATA}run_id"] == "r1"
    assert shown[f"{METADATA}team"] == "blue"
    assert shown[f"{METADATA}label.run_id"] == "theirs"
    assert shown[f"{METADATA}label.label.run_id"] == "x"
    assert shown[f"{METADATA}label.error_code"] == "none"
