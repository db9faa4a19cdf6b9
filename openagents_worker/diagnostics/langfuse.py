"""The exporter `langfuse`: the only place that knows how Langfuse reads a run.

Langfuse takes traces by OTLP. The attributes are those of its documentation of OpenTelemetry.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping

from pydantic import Field, SecretStr, field_validator

from openagents_worker.agents.plugin import Plugin
from openagents_worker.diagnostics.base import CallReport, RunReport
from openagents_worker.diagnostics.otlp import Attributes, OtlpExporter
from openagents_worker.secret_forms import remember_secret

__all__ = ["LangfuseExporter"]

PATH = "/api/public/otel/v1/traces"
LABEL = "label."
"""Before the name of a label that is also a key of ours, such as `run_id`."""


class LangfuseExporter(OtlpExporter):
    """Sends each run as a trace to Langfuse: session, agent, usage, latencies and calls; no content."""

    class Config(Plugin.Config):
        """Of the original SDK, but `timeout_s`."""

        public_key: str = Field(min_length=1, description="The public key of the project.")
        secret_key: SecretStr = Field(description="The secret key; write ${LANGFUSE_SECRET_KEY}.")
        host: str = Field("https://cloud.langfuse.com", description="The address of Langfuse.")
        timeout_s: float = Field(10.0, gt=0, le=60, description="Seconds that sending one run may take.")

        @field_validator("host")
        @classmethod
        def _is_url(cls, host: str) -> str:
            if not host.startswith(("http://", "https://")):
                raise ValueError("must begin with https:// or http://")
            return host.rstrip("/")

    def endpoint(self) -> str:
        return f"{self.cfg.host}{PATH}"

    def headers(self) -> Mapping[str, str]:
        key = self.cfg.secret_key.get_secret_value()
        credentials = b64encode(f"{self.cfg.public_key}:{key}".encode()).decode()
        remember_secret(key)
        remember_secret(credentials)
        return {"Authorization": f"Basic {credentials}", "x-langfuse-ingestion-version": "4"}

    def of_run(self, report: RunReport) -> Attributes:
        result, usage = report.result, report.result.usage
        snapshot = report.error_snapshot or {}
        metadata = {
            "run_id": result.run_id,
            "agent_id": report.agent_id,
            "stop_reason": result.stop_reason.value,
            "attempts": report.attempts,
            "llm_calls": usage.llm_calls,
            "tool_calls": usage.tool_calls,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cost_usd": usage.cost_usd,
            "llm_latency_p50_ms": usage.llm_latency_p50_ms,
            "llm_latency_p95_ms": usage.llm_latency_p95_ms,
            "llm_retry_count": usage.llm_retry_count,
            "ttft_ms": usage.ttft_ms,
            **{name: snapshot.get(name) for name in ("error_type", "error_code", "error_message")},
        }
        metadata |= {_label_key(name, metadata): value for name, value in report.labels.items()}
        return {
            "langfuse.trace.name": f"invoke_agent {report.agent_id}",
            "session.id": report.session_id,
            "langfuse.observation.type": "agent",
            **_level(None if result.ok else str(snapshot.get("error_message") or result.stop_reason.value)),
            **{
                f"langfuse.trace.metadata.{key}": value
                for key, value in metadata.items()
                if value is not None
            },
        }

    def of_call(self, call: CallReport) -> Attributes:
        metrics = call.metrics
        if metrics is None:
            return {"langfuse.observation.type": "tool", **_level(call.error)}
        shown = {"latency_ms": metrics.latency_ms, "ttft_ms": metrics.ttft_ms, "attempt": metrics.attempt}
        return {
            "langfuse.observation.type": "generation",
            "langfuse.observation.model.name": metrics.model,
            "gen_ai.usage.input_tokens": metrics.input_tokens,
            "gen_ai.usage.output_tokens": metrics.output_tokens,
            "gen_ai.usage.cache_read_input_tokens": metrics.cached_tokens,
            **_level(metrics.error),
            **{f"langfuse.observation.metadata.{k}": v for k, v in shown.items() if v is not None},
        }


def _label_key(name: str, ours: Mapping[str, object]) -> str:
    """The key of a label in the metadata. A label has its own name there, unless that is a key of ours."""
    return f"{LABEL}{name}" if name in ours or name.startswith(LABEL) else name


def _level(error: str | None) -> Attributes:
    if error is None:
        return {}
    return {"langfuse.observation.level": "ERROR", "langfuse.observation.status_message": error}
