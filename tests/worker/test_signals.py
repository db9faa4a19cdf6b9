"""Signals: one trace from the producer to the end of a run, over a kill of its worker; by default nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased

from openagents_worker.errors import LLMResponseError
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings
from openagents_worker.telemetry import signals
from openagents_worker.telemetry.opentelemetry import OpenTelemetryExporter, export_to_opentelemetry
from tests.support.waiting import wait_for


class Reported:
    """The spans and the counters that this process has reported to OpenTelemetry."""

    def __init__(self) -> None:
        self._spans, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self.meters = MeterProvider([self._reader])

    def spans(self) -> list[dict[str, Any]]:
        return [json.loads(span.to_json()) for span in self._spans.get_finished_spans()]

    def counts(self) -> dict[str, float]:
        data = self._reader.get_metrics_data()
        assert data is not None
        return {
            metric.name: sum(point.value for point in metric.data.data_points)  # type: ignore[union-attr,misc]
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if hasattr(metric.data.data_points[0], "value")
        }


@pytest.fixture
def reported() -> Generator[Reported]:
    reported = Reported()
    export_to_opentelemetry(reported.provider, reported.meters)
    yield reported
    signals.unregister_exporter()


def test_without_an_exporter_nothing_is_reported() -> None:
    """Every call returns the same object, and computes nothing."""
    with signals.span("a") as one, signals.inner_span("b") as other:
        one.set("x", 1)
        one.fail("code")
        signals.annotate("x", 1)
        signals.count("c")

    assert one is other is signals.NO_SPAN
    assert not signals.is_enabled()
    assert signals.with_traceparent({"priority": 1}) == {"priority": 1}


def test_spans_are_nested_and_carry_attributes(reported: Reported) -> None:
    """An inner span of Redis is only reported inside another one."""
    with signals.inner_span("outside"):
        pass
    with signals.span("outer", {"a": 1}) as outer:
        outer.set("b", "two")
        with signals.inner_span("inner"):
            signals.annotate("c", True)

    inner, outer_span = reported.spans()

    assert (inner["name"], outer_span["name"]) == ("inner", "outer")
    assert inner["parent_id"] == outer_span["context"]["span_id"]
    assert outer_span["attributes"] == {"a": 1, "b": "two"}
    assert inner["attributes"] == {"c": True}


def test_an_error_is_reported_by_its_code_and_not_by_its_text(reported: Reported) -> None:
    """The text of an exception may contain a secret."""
    with pytest.raises(LLMResponseError), signals.span("chat m"):
        raise LLMResponseError("the key sk-123 is wrong")

    (span,) = reported.spans()

    assert span["status"] == {"status_code": "ERROR", "description": "llm.response"}
    assert span["attributes"] == {"error.type": "llm.response"}
    assert span["events"] == []


def test_a_parent_from_another_process_is_continued(reported: Reported) -> None:
    """Only where no span surrounds it. A parent that is not valid is ignored."""
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with signals.span("continued", parent=parent):
        headers = signals.with_traceparent({})["headers"]
        own = signals.with_traceparent({"headers": {"traceparent": "mine", "x": 1}})["headers"]
    with signals.span("alone", parent="nonsense"):
        pass

    continued, alone = reported.spans()

    assert continued["context"]["trace_id"] == f"0x{parent[3:35]}"
    assert continued["parent_id"] == f"0x{parent[36:52]}"
    assert alone["parent_id"] is None
    assert headers["traceparent"].startswith(parent[:36])
    assert own == {"traceparent": "mine", "x": 1}


def test_a_run_without_a_span_of_its_producer_has_a_trace_of_its_own(reported: Reported) -> None:
    """Its ids derive from the run, so all attempts have the same, whatever process they are in."""
    one, again, other = (signals.traceparent_of(seed) for seed in ("r1 u", "r1 u", "r2 u"))

    assert one == again != other
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", one)


def test_the_sampler_of_the_application_decides_about_such_a_trace() -> None:
    """A deployment that keeps one trace in ten keeps one in ten of these, too, with all their attempts."""
    exporter = OpenTelemetryExporter(TracerProvider(sampler=ParentBased(TraceIdRatioBased(0.1))))
    sampled = [exporter.traceparent_of(f"r{number} u").endswith("-01") for number in range(1_000)]

    assert 50 < sum(sampled) < 150
    assert OpenTelemetryExporter(TracerProvider(sampler=ALWAYS_OFF)).traceparent_of("r1 u").endswith("-00")


def test_a_submission_outside_of_a_span_begins_a_trace(reported: Reported) -> None:
    """In a producer that sends spans. Its span is the parent of all attempts."""
    headers = signals.with_traceparent({})["headers"]

    [submitted] = reported.spans()
    assert submitted["name"] == "openagents.submit"
    assert headers["traceparent"].split("-")[1:3] == [
        submitted["context"]["trace_id"].removeprefix("0x"),
        submitted["context"]["span_id"].removeprefix("0x"),
    ]


@pytest.mark.parametrize(
    ("value", "captures"),
    [("", False), ("NO_CONTENT", False), ("EVENT_ONLY", False), ("SPAN_ONLY", True), ("true", True)],
)
def test_content_is_captured_only_if_the_variable_says_so(
    value: str, captures: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its values of the conventions, and by `true` of earlier ones."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", value)

    assert OpenTelemetryExporter().captures_content is captures


def test_an_attribute_may_be_any_text(reported: Reported) -> None:
    """Half of a surrogate pair would lose all spans that are sent with it."""
    with signals.span("a", {"x": "\ud800"}) as current:
        current.set("y", "\ud800")
        signals.annotate("z", "é")

    assert reported.spans()[0]["attributes"] == {"x": "?", "y": "?", "z": "é"}


def test_meters_receive_measurements_but_no_spans(reported: Reported) -> None:
    """Besides an exporter. A meter that is registered twice counts once."""

    class Meter:
        def __init__(self) -> None:
            self.got: list[tuple[str, float]] = []

        def count(self, name: str, value: float, attributes: object) -> None:
            self.got.append((name, value))

        observe = count

    meter = Meter()
    signals.register_meter(meter)
    signals.register_meter(meter)
    with signals.span("a"):
        signals.count("c", 2)
        signals.observe("d", 0.5)
    signals.unregister_meter(meter)
    signals.count("c", 3)

    assert meter.got == [("c", 2), ("d", 0.5)]
    assert reported.counts()["c"] == 5


def test_a_second_exporter_is_refused(reported: Reported) -> None:
    """It would replace the first one in silence."""
    with pytest.raises(RuntimeError, match="registered already"):
        export_to_opentelemetry(reported.provider)


def test_counters_add_up(reported: Reported) -> None:
    """Each counter has one name, whatever its attributes."""
    signals.count("openagents.calls", 1, {"kind": "model"})
    signals.count("openagents.calls", 2, {"kind": "tool"})

    assert reported.counts() == {"openagents.calls": 3}


def start(processes: ExitStack, redis_url: str, spans: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.worker.traced_process", str(spans)],
        env={**os.environ, "OPENAGENTS_REDIS_URL": redis_url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    processes.enter_context(process)
    processes.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


@pytest.mark.long
def test_a_run_is_one_trace_from_its_producer_over_a_kill_to_its_end(
    reported: Reported, redis_url: str, tmp_path: Path
) -> None:
    """Spans follow the conventions of OpenTelemetry, and contain no prompt, answer, argument or result."""
    file = tmp_path / "spans"
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url})
    request = {"agent_id": "traced", "session_id": "s1", "input_text": "a secret question", "run_id": "r1"}
    with ExitStack() as processes, Client(settings=settings) as client:
        first = start(processes, redis_url, file)
        with signals.span("order"):
            handle = client.submit(request)
        wait_for(lambda: handle.record().steps >= 3, "the first tool was called")
        first.kill()
        Path(f"{file}.go").touch()
        second = start(processes, redis_url, file)
        result = handle.wait(60)
        assert second.stdin is not None
        second.stdin.close()
        assert second.wait(60) == 0

    text = file.read_text()
    of_workers = [json.loads(line) for line in text.splitlines()]
    of_producer = {span["name"]: span for span in reported.spans()}
    [order] = [span for name, span in of_producer.items() if name == "order"]
    of_run = [span for span in of_workers if span["context"]["trace_id"] == order["context"]["trace_id"]]
    *_, attempt = [span for span in of_run if span["name"] == "invoke_agent traced"]
    made = [span["name"] for span in of_run if span["name"] in ("chat scripted", "execute_tool note")]
    names = {span["name"] for span in of_run if not span["name"].startswith("openagents.")}

    assert result.final_output == "the secret answer"
    assert names == {"chat scripted", "execute_tool note", "execute_tool wait_for_go", "invoke_agent traced"}
    assert sorted(made) == ["chat scripted"] * 3 + ["execute_tool note"]  # no call was made twice
    assert attempt["parent_id"] == order["context"]["span_id"]
    assert attempt["attributes"] == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.id": "traced",
        "gen_ai.conversation.id": "s1",
        "openagents.run.id": "r1",
        "openagents.run.attempt": 2,
        "openagents.run.life": 1,
        "openagents.run.recoveries": 1,
        "openagents.outcome": "finished",
        "openagents.stop_reason": "completed",
    }
    [note] = [span for span in of_run if span["name"] == "execute_tool note"]
    assert note["attributes"].items() >= {"gen_ai.operation.name": "execute_tool"}.items()
    assert note["attributes"]["gen_ai.tool.name"] == "note"
    [*_, chat] = [span for span in of_run if span["name"] == "chat scripted"]
    assert chat["kind"] == "SpanKind.CLIENT"
    assert chat["attributes"]["gen_ai.provider.name"] == "scripted"
    assert "openagents.redis commit" in {span["name"] for span in of_run}
    assert "openagents.publish" in of_producer
    assert "secret" not in text
