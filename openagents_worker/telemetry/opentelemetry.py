"""OpenTelemetry: the only place that knows it. An exporter that passes our signals to its API.

Needs the extra `otel`, or another installation of `opentelemetry-api`. Configure its SDK as usual (a tracer
provider, a meter provider), then call `export_to_opentelemetry()` in each process.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from openagents_worker.errors import OpenAgentsError
from openagents_worker.telemetry.series import SIGNALS
from openagents_worker.telemetry.signals import AttributeValue, Span, register_exporter

__all__ = ["OpenTelemetryExporter", "export_to_opentelemetry"]

SCOPE = "openagents_worker"
CLIENT_SPANS = ("chat ", "openagents.publish", "openagents.redis ")  # spans of calls to other systems
_PROPAGATOR = TraceContextTextMapPropagator()


def export_to_opentelemetry(
    tracer_provider: trace.TracerProvider | None = None, meter_provider: metrics.MeterProvider | None = None
) -> OpenTelemetryExporter:
    """Send all signals of this process to OpenTelemetry; by default to its global providers."""
    exporter = OpenTelemetryExporter(tracer_provider, meter_provider)
    register_exporter(exporter)
    return exporter


class OpenTelemetryExporter:
    """Makes a span or a counter of OpenTelemetry for each of our signals."""

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        self._meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
        self._counters: dict[str, metrics.Counter] = {}
        self._histograms: dict[str, metrics.Histogram] = {}

    def span(
        self, name: str, attributes: Mapping[str, AttributeValue], parent: str
    ) -> AbstractContextManager[Span]:
        return self._span(name, attributes, parent)

    @contextmanager
    def _span(
        self, name: str, attributes: Mapping[str, AttributeValue], parent: str
    ) -> Generator[_OpenTelemetrySpan]:
        has_parent = trace.get_current_span().get_span_context().is_valid
        context = _PROPAGATOR.extract({"traceparent": parent}) if parent and not has_parent else None
        kind = SpanKind.CLIENT if name.startswith(CLIENT_SPANS) else SpanKind.INTERNAL
        # The text of an exception may contain a secret, so only its code is recorded.
        with self._tracer.start_as_current_span(
            name,
            context=context,
            kind=kind,
            attributes=dict(attributes),
            record_exception=False,
            set_status_on_exception=False,
        ) as current:
            made = _OpenTelemetrySpan(current)
            try:
                yield made
            except BaseException as error:
                made.fail(error.code if isinstance(error, OpenAgentsError) else type(error).__qualname__)
                raise

    def count(self, name: str, value: float, attributes: Mapping[str, AttributeValue]) -> None:
        counter = self._counters.get(name)
        if counter is None:
            series = SIGNALS.get(name)
            made = self._meter.create_counter(name, description=series.help if series else "")
            counter = self._counters.setdefault(name, made)
        counter.add(value, dict(attributes))

    def observe(self, name: str, value: float, attributes: Mapping[str, AttributeValue]) -> None:
        histogram = self._histograms.get(name)
        if histogram is None:
            series = SIGNALS.get(name)
            made = self._meter.create_histogram(
                name,
                unit="s",
                description=series.help if series else "",
                explicit_bucket_boundaries_advisory=series.buckets if series else None,
            )
            histogram = self._histograms.setdefault(name, made)
        histogram.record(value, dict(attributes))

    def annotate(self, name: str, value: AttributeValue) -> None:
        trace.get_current_span().set_attribute(name, value)

    def traceparent(self) -> str:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier.get("traceparent", "")


class _OpenTelemetrySpan:
    def __init__(self, current: Any) -> None:
        self._current = current

    def set(self, name: str, value: AttributeValue) -> None:
        self._current.set_attribute(name, value)

    def fail(self, code: str) -> None:
        self._current.set_attribute("error.type", code)
        self._current.set_status(Status(StatusCode.ERROR, code))
