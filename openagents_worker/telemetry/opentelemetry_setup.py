"""OpenTelemetry setup: the only place that configures its SDK, from the variables of OpenTelemetry alone.

The SDK itself reads `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_TRACES_SAMPLER` and the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import MeterProvider as AnyMeterProvider
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NoOpTracerProvider
from opentelemetry.trace import TracerProvider as AnyTracerProvider

from openagents_worker.telemetry.opentelemetry import export_to_opentelemetry
from openagents_worker.telemetry.signals import unregister_exporter

__all__ = ["start_export"]

DEFAULT_SERVICE = "openagents-worker"
NONE = "none"


def start_export(env: Mapping[str, str]) -> Callable[[], None]:
    """Send spans and measurements of this process over OTLP. Returns what sends the rest and ends it.

    `OTEL_TRACES_EXPORTER=none` and `OTEL_METRICS_EXPORTER=none` switch one of the two off.
    """
    resource = Resource.create({} if env.get("OTEL_SERVICE_NAME") else {"service.name": DEFAULT_SERVICE})
    ends: list[Callable[[], None]] = []
    tracers: AnyTracerProvider = NoOpTracerProvider()
    if env.get("OTEL_TRACES_EXPORTER") != NONE:
        tracers = made = TracerProvider(resource=resource, shutdown_on_exit=False)
        made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        ends.append(made.shutdown)
    meters: AnyMeterProvider = NoOpMeterProvider()
    if env.get("OTEL_METRICS_EXPORTER") != NONE:
        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        meters = measured = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        ends.append(measured.shutdown)
    export_to_opentelemetry(tracers, meters)

    def end() -> None:
        unregister_exporter()
        for each in ends:
            each()

    return end
