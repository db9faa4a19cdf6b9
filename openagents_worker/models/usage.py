"""Usage. The only place that adds up the tokens, calls and costs of a run."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from openagents_worker.jsontext import LARGEST_COUNT

__all__ = ["RunUsage"]


class RunUsage(BaseModel):
    """The model calls, tool calls, tokens and cost of a run.

    The provider counts the tokens. `cost_usd` is None while no price is known. The class is not frozen,
    because patterns for the original SDK change `context.usage`, which is a copy.
    """

    model_config = ConfigDict(extra="ignore")  # a newer version may have more counters

    llm_calls: int = 0
    tool_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_cached: int = 0
    input_tokens_cache_creation: int = 0
    cost_usd: float | None = None
    cost_breakdown: dict[str, float] = Field(default_factory=dict)
    ttft_ms: float | None = None
    llm_retry_count: int = 0

    def plus(self, delta: RunUsage) -> RunUsage:
        """The sum of two usages. No count exceeds 2^53. `ttft_ms` is the first known one."""
        costs = dict(self.cost_breakdown)
        for name, usd in delta.cost_breakdown.items():
            costs[name] = round(costs.get(name, 0.0) + usd, 12)
        known = [c for c in (self.cost_usd, delta.cost_usd) if c is not None]
        return RunUsage(
            llm_calls=min(self.llm_calls + delta.llm_calls, LARGEST_COUNT),
            tool_calls=min(self.tool_calls + delta.tool_calls, LARGEST_COUNT),
            input_tokens=min(self.input_tokens + delta.input_tokens, LARGEST_COUNT),
            output_tokens=min(self.output_tokens + delta.output_tokens, LARGEST_COUNT),
            total_tokens=min(self.total_tokens + delta.total_tokens, LARGEST_COUNT),
            input_tokens_cached=min(self.input_tokens_cached + delta.input_tokens_cached, LARGEST_COUNT),
            input_tokens_cache_creation=min(
                self.input_tokens_cache_creation + delta.input_tokens_cache_creation, LARGEST_COUNT
            ),
            cost_usd=round(sum(known), 12) if known else None,
            cost_breakdown=costs,
            ttft_ms=self.ttft_ms if self.ttft_ms is not None else delta.ttft_ms,
            llm_retry_count=min(self.llm_retry_count + delta.llm_retry_count, LARGEST_COUNT),
        )
