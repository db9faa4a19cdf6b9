"""Usage. The only place that adds up the tokens, calls and costs of a run."""

from __future__ import annotations

from typing import Any

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
        total = dict(self.__dict__)
        own = delta.__dict__
        for name in _COUNTS:
            if own[name] or total[name] > LARGEST_COUNT:
                total[name] = min(total[name] + own[name], LARGEST_COUNT)
        costs = dict(self.cost_breakdown)
        for name, usd in delta.cost_breakdown.items():
            costs[name] = round(costs.get(name, 0.0) + usd, 12)
        total["cost_breakdown"] = costs
        known = [c for c in (self.cost_usd, delta.cost_usd) if c is not None]
        total["cost_usd"] = round(sum(known), 12) if known else None
        if self.ttft_ms is None:
            total["ttft_ms"] = delta.ttft_ms
        return RunUsage(**total)

    def known(self) -> dict[str, Any]:
        """The fields that differ from their defaults: what was counted, and the costs that are known."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if value or (value is not None and name in _OPTIONAL)
        }


_OPTIONAL = frozenset(name for name, field in RunUsage.model_fields.items() if field.default is None)
_COUNTS = tuple(name for name, field in RunUsage.model_fields.items() if field.annotation is int)
