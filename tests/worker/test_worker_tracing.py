"""When a worker sends spans by itself: OpenTelemetry's variables decide, and a worker starts in any case."""

from __future__ import annotations

import socket

import pytest

from openagents_worker.telemetry import signals
from openagents_worker.worker import worker_tracing
from openagents_worker.worker.worker_tracing import WorkerTracing, wants_tracing

COLLECTOR = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    ("env", "wants"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "shop"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        (COLLECTOR, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"}, True),
        ({**COLLECTOR, "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_a_named_collector_gets_the_spans(env: dict[str, str], wants: bool) -> None:
    """Without one nothing is sent, and nothing is loaded for it."""
    assert wants_tracing(env) is wants


def test_a_missing_package_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker works without a collector, too. `status` shows the part as failing."""
    monkeypatch.setattr(worker_tracing, "PACKAGE", "openagents_worker_missing.package")
    tracing = WorkerTracing(COLLECTOR)
    tracing.start()
    tracing.stop()

    assert "traces.not_exported" in caplog.text
    assert "openagents-worker[otel]" in caplog.text
    assert tracing.health.report().error_code == "traces.not_exported"
    assert not signals.is_enabled()


def test_a_collector_that_does_not_answer_does_not_hold_the_end_of_a_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes connections, and says nothing."""
    pytest.importorskip(worker_tracing.PACKAGE)
    monkeypatch.setattr(worker_tracing, "END_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name in ("ENDPOINT", "TIMEOUT"):
            monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", endpoint if name == "ENDPOINT" else "30")
        tracing = WorkerTracing()
        tracing.start()
        with signals.span("openagents.submit"):
            pass
        tracing.stop()

    assert "traces.not_sent" in caplog.text
    assert not signals.is_enabled()


def test_another_protocol_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """The extra brings the exporter for HTTP, and no gRPC."""
    WorkerTracing({**COLLECTOR, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}).start()

    assert "OTEL_EXPORTER_OTLP_PROTOCOL is grpc; only http/protobuf is supported" in caplog.text
    assert not signals.is_enabled()


def test_an_exporter_of_the_application_is_kept() -> None:
    """It has called `export_to_opentelemetry` with providers of its own."""

    class Exporter:
        captures_content = False

    exporter = Exporter()
    signals.register_exporter(exporter)  # type: ignore[arg-type]
    try:
        tracing = WorkerTracing(COLLECTOR)
        tracing.start()
        tracing.stop()
        assert signals.is_enabled()
    finally:
        signals.unregister_exporter()
