"""Exporters that speak OTLP: the only place that makes spans of OpenTelemetry from a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from hashlib import sha256
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from openagents_worker.diagnostics.base import CallReport, DiagnosticsExporter, RunReport

__all__ = ["OtlpExporter", "trace_id"]

SCOPE = InstrumentationScope("openagents.diagnostics")
Attributes = dict[str, str | int | float | bool]


def trace_id(key: str) -> str:
    """The id of the trace of a report: the first 32 hex digits of the SHA-256 of its key.

    Langfuse's own `create_trace_id(seed=run_id)` is the same for the first life of a run.
    """
    return sha256(key.encode()).hexdigest()[:32]


class OtlpExporter(DiagnosticsExporter):
    """Sends a run as one trace: a span for the run, and one for each call of a model or a tool.

    The ids of trace and spans follow from the run, so a trace that is sent twice replaces itself.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self._resource = Resource({"service.name": "openagents-worker", **self.resource()})
        self._sender = OTLPSpanExporter(
            endpoint=self.endpoint(), headers=dict(self.headers()), timeout=self.cfg.timeout_s
        )

    def endpoint(self) -> str:
        """The URL to which spans are sent."""
        raise NotImplementedError

    def headers(self) -> Mapping[str, str]:
        raise NotImplementedError

    def resource(self) -> Mapping[str, str]:
        """Further attributes of the resource."""
        return {}

    def of_run(self, report: RunReport) -> Attributes:
        """The attributes of the span of the run."""
        raise NotImplementedError

    def of_call(self, call: CallReport) -> Attributes:
        """The attributes of the span of a call."""
        raise NotImplementedError

    def export(self, report: RunReport) -> None:
        if self._sender.export(list(self._spans(report))) is not SpanExportResult.SUCCESS:
            raise ConnectionError(f"{self.endpoint()} has not accepted the trace")

    def close(self) -> None:
        self._sender.shutdown()

    def _spans(self, report: RunReport) -> Iterator[ReadableSpan]:
        error = report.result.error_details
        root = self._context(report, "run")
        code = error.code if error is not None else None
        yield self._span(f"invoke_agent {report.agent_id}", root, None, report, self.of_run(report), code)
        for call in report.calls:
            operation = "chat" if call.kind == "model" else "execute_tool"
            context = self._context(report, f"{call.kind}:{call.call_id}")
            yield self._span(f"{operation} {call.name}", context, root, call, self.of_call(call), call.error)

    def _context(self, report: RunReport, part: str) -> SpanContext:
        span_id = int(sha256(f"{report.key}\0{part}".encode()).hexdigest()[:16], 16)
        return SpanContext(int(trace_id(report.key), 16), span_id, is_remote=False, trace_flags=TraceFlags(1))

    def _span(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        timed: RunReport | CallReport,
        attributes: Attributes,
        error: str | None,
    ) -> ReadableSpan:
        status = Status(StatusCode.ERROR, error) if error else None
        return ReadableSpan(
            name=name,
            context=context,
            parent=parent,
            resource=self._resource,
            attributes={**attributes, **({"error.type": error} if error else {})},
            kind=SpanKind.CLIENT if name.startswith("chat ") else SpanKind.INTERNAL,
            instrumentation_scope=SCOPE,
            status=status or Status(StatusCode.UNSET),
            start_time=_nanoseconds(timed.began_at),
            end_time=_nanoseconds(timed.ended_at),
        )


def _nanoseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000) * 1_000_000
