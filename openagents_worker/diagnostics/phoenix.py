"""The exporter `phoenix`: the only place that knows how Arize Phoenix reads a run.

Phoenix takes traces by OTLP. The attributes are those of the original SDK, and the ones of OpenInference by
which Phoenix shows kinds, models and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, SecretStr, field_validator

from openagents_worker.agents.plugin import Plugin
from openagents_worker.diagnostics.base import CallReport, RunReport
from openagents_worker.diagnostics.otlp import Attributes, OtlpExporter
from openagents_worker.secret_forms import remember_secret

__all__ = ["PhoenixExporter"]


class PhoenixExporter(OtlpExporter):
    """Sends each run as a trace to Phoenix: session, agent, usage, latencies and calls; no content."""

    class Config(Plugin.Config):
        """The original SDK configures OpenTelemetry's global tracer provider instead."""

        endpoint: str = Field(
            "http://localhost:6006/v1/traces", description="The URL of Phoenix that takes traces (OTLP)."
        )
        project_name: str = Field("default", min_length=1, description="The project in Phoenix.")
        api_key: SecretStr | None = Field(None, description="The API key; write ${PHOENIX_API_KEY}.")
        timeout_s: float = Field(10.0, gt=0, le=60, description="Seconds that sending one run may take.")

        @field_validator("endpoint")
        @classmethod
        def _is_url(cls, endpoint: str) -> str:
            if not endpoint.startswith(("http://", "https://")):
                raise ValueError("must begin with https:// or http://")
            return endpoint

    def endpoint(self) -> str:
        return str(self.cfg.endpoint)

    def headers(self) -> Mapping[str, str]:
        if self.cfg.api_key is None:
            return {}
        key = self.cfg.api_key.get_secret_value()
        remember_secret(key)
        return {"authorization": f"Bearer {key}"}

    def resource(self) -> Mapping[str, str]:
        return {"openinference.project.name": self.cfg.project_name}

    def of_run(self, report: RunReport) -> Attributes:
        result, usage = report.result, report.result.usage
        snapshot = report.error_snapshot or {}
        known = {
            "run.llm_latency_p50_ms": usage.llm_latency_p50_ms,
            "run.llm_latency_p95_ms": usage.llm_latency_p95_ms,
            "run.ttft_ms": usage.ttft_ms,
            "run.cost_usd": usage.cost_usd,
            "error.code": snapshot.get("error_code"),
            "error.message": snapshot.get("error_message"),
        }
        return {
            "openinference.span.kind": "AGENT",
            "session.id": report.session_id,
            "agent.name": report.agent_id,
            "run.id": result.run_id,
            "run.stop_reason": result.stop_reason.value,
            "run.attempts": report.attempts,
            "run.llm_calls": usage.llm_calls,
            "run.tool_calls": usage.tool_calls,
            "run.input_tokens": usage.input_tokens,
            "run.output_tokens": usage.output_tokens,
            "run.llm_retry_count": usage.llm_retry_count,
            **{f"run.labels.{name}": value for name, value in report.labels.items()},
            **{name: value for name, value in known.items() if value is not None},
        }

    def of_call(self, call: CallReport) -> Attributes:
        metrics = call.metrics
        if metrics is None:
            return {"openinference.span.kind": "TOOL", "tool.name": call.name}
        return {
            "openinference.span.kind": "LLM",
            "llm.model_name": metrics.model,
            "llm.token_count.prompt": metrics.input_tokens,
            "llm.token_count.completion": metrics.output_tokens,
            "llm.token_count.total": metrics.input_tokens + metrics.output_tokens,
            "llm.token_count.prompt_details.cache_read": metrics.cached_tokens,
            "llm.latency_ms": metrics.latency_ms,
            "llm.attempt": metrics.attempt,
            **({} if metrics.ttft_ms is None else {"llm.ttft_ms": metrics.ttft_ms}),
        }
