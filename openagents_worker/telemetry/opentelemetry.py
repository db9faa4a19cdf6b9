"""OpenTelemetry: the only place that knows it. An exporter that passes our signals to its API.

Needs the extra `otel`, or another installation of `opentelemetry-api`. Configure its SDK as usual (a tracer
provider, a meter provider), then call `export_to_opentelemetry()` in each process.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from typing import Any

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from openagents_worker.errors import OpenAgentsError
from openagents_worker.telemetry.series import SIGNALS
from openagents_worker.telemetry.signals import AttributeValue, Span, register_exporter

__all__ = ["OpenTelemetryExporter", "export_to_opentelemetry"]

SCOPE = "openagents_worker"
CLIENT_SPANS = ("chat ", "openagents.publish", "openagents.redis ")  # spans of calls to other systems
CAPTURE_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
CAPTURED_IN_SPANS = ("true", "span_only", "span_and_event")  # `true` is the value of earlier conventions
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
        self._sampler = getattr(tracer_provider or trace.get_tracer_provider(), "sampler", None)
        self.captures_content = os.environ.get(CAPTURE_CONTENT, "").strip().lower() in CAPTURED_IN_SPANS

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
            attributes={key: _encodable(value) for key, value in attributes.items()},
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

    def traceparent_of(self, seed: str) -> str:
        digest = blake2b(seed.encode(errors="surrogatepass"), digest_size=24).digest()
        trace_id, span_id = digest[:16].hex(), digest[16:].hex()
        return f"00-{trace_id}-{span_id}-{'01' if self._is_sampled(int(trace_id, 16)) else '00'}"

    def _is_sampled(self, trace_id: int) -> bool:
        """What the sampler of the application decides about a new trace with this id."""
        if self._sampler is None:
            return True
        decided = self._sampler.should_sample(Context(), trace_id, "invoke_agent")
        return bool(decided.decision.is_sampled())

    def annotate(self, name: str, value: AttributeValue) -> None:
        trace.get_current_span().set_attribute(name, _encodable(value))

    def traceparent(self) -> str:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier.get("traceparent", "")


def _encodable(value: AttributeValue) -> AttributeValue:
    """A text that can be sent: half of a surrogate pair would lose all spans that are sent with it."""
    if isinstance(value, str) and not value.isascii():
        return value.encode(errors="replace").decode()
    return value


class _OpenTelemetrySpan:
    def __init__(self, current: Any) -> None:
        self._current = current

    def set(self, name: str, value: AttributeValue) -> None:
        self._current.set_attribute(name, _encodable(value))

    def fail(self, code: str) -> None:
        self._current.set_attribute("error.type", code)
        self._current.set_status(Status(StatusCode.ERROR, code))
