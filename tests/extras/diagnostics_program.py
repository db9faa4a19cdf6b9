"""Exports two runs to a real HTTP server, and prints what the server got.

For an environment with the packages of Langfuse, Phoenix and rich, which send a trace to the same server.
"""

from __future__ import annotations

import gzip
import json
import sys
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOT: list[dict[str, Any]] = []
STATUS = [200]


class Door(BaseHTTPRequestHandler):
    """Takes traces by OTLP."""

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest()
        if "traces" in self.path:
            request.ParseFromString(body)
        GOT.append(
            {
                "path": self.path,
                "authorization": self.headers.get("authorization"),
                "type": self.headers.get("content-type"),
                "spans": [span_of(span) for each in request.resource_spans for span in spans_of(each)],
                "resource": [attributes(each.resource.attributes) for each in request.resource_spans],
            }
        )
        self.send_response(STATUS[0])
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


def spans_of(resource: Any) -> Any:
    return [span for scope in resource.scope_spans for span in scope.spans]


def span_of(span: Any) -> dict[str, Any]:
    return {
        "name": span.name,
        "trace_id": span.trace_id.hex(),
        "span_id": span.span_id.hex(),
        "parent": span.parent_span_id.hex(),
        "took_ms": (span.end_time_unix_nano - span.start_time_unix_nano) / 1_000_000,
        "failed": span.status.code == 2,
        "attributes": attributes(span.attributes),
    }


def attributes(pairs: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in pairs}


def reports() -> list[Any]:
    """A completed and a failed run."""
    from openagents_worker.diagnostics.base import CallReport, LLMCallMetrics, RunReport
    from openagents_worker.models import RunResult, RunUsage, StopReason

    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    usage = RunUsage(llm_calls=1, tool_calls=1, input_tokens=10, output_tokens=5, llm_latency_p50_ms=300.0)
    metrics = LLMCallMetrics("m-1", 300.0, 10, 5, 2, 50.0)
    labels = {"team": "blue"}
    calls = (
        CallReport("m:1", "model", "m-1", at, at + timedelta(seconds=0.3), metrics),
        CallReport("add:1", "tool", "add", at, at + timedelta(seconds=1), error="tool.error"),
    )
    snapshot = {"error_type": "KeyError", "error_code": "tool.error", "error_message": "[no] such item"}
    chain = {"tool_call_chain": [{"tool_id": "add", "params": {"x": "SECRET"}}]}
    good = RunResult[Any](run_id="r1", final_output="SECRET", usage=usage)
    bad = RunResult[Any](
        run_id="r2",
        stop_reason=StopReason.FAILED,
        usage=usage,
        metadata={"error_snapshot": {**snapshot, **chain}},
    )
    return [
        RunReport(result.run_id, "shop", "s1", result, at, at + timedelta(seconds=2), calls, 1, labels)
        for result in (good, bad)
    ]


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    from openagents_worker.agents import DiagnosticsRef
    from openagents_worker.diagnostics import BUILTIN_DIAGNOSTICS
    from openagents_worker.runtime.plugins import make_plugin

    def exporter(type_: str, **config: Any) -> Any:
        return make_plugin("diagnostics", DiagnosticsRef(type=type_, config=config), BUILTIN_DIAGNOSTICS)

    langfuse = exporter("langfuse", public_key="pk", secret_key="sk", host=url)
    phoenix = exporter("phoenix", endpoint=f"{url}/v1/traces", project_name="shop", api_key="key")
    rich = exporter("rich")
    for report in reports():
        for each in (langfuse, phoenix, rich):
            each.export(report)
    STATUS[0] = 400
    failures = []
    for each in (langfuse, phoenix):
        try:
            each.export(reports()[0])
        except ConnectionError as error:
            failures.append(str(error))
    STATUS[0] = 200
    ours, before = list(GOT), len(GOT)

    from langfuse import Langfuse
    from langfuse._client.attributes import LangfuseOtelSpanAttributes
    from phoenix.otel import register

    client = Langfuse(public_key="pk", secret_key="sk", base_url=url)
    client.start_observation(name="theirs", as_type="generation", model="m").end()
    client.flush()
    provider = register(
        endpoint=f"{url}/v1/traces",
        project_name="shop",
        api_key="key",
        protocol="http/protobuf",
        set_global_tracer_provider=False,
        verbose=False,
    )
    provider.get_tracer("t").start_span("theirs").end()
    provider.force_flush()
    known = [value for value in vars(LangfuseOtelSpanAttributes).values() if isinstance(value, str)]
    found = {
        "ours": ours,
        "theirs": GOT[before:],
        "failures": failures,
        "langfuse_attributes": known,
        "trace_id": Langfuse.create_trace_id(seed="r1"),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
