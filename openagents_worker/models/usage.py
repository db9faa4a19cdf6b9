"""Usage. The only place that adds up the tokens, calls and costs of a run."""

from __future__ import annotations

from itertools import compress
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from openagents_worker.jsontext import LARGEST_COUNT

__all__ = ["NO_USAGE", "ONE_TOOL_CALL", "RunUsage", "usage_of"]


class RunUsage(BaseModel):
    """The model calls, tool calls, tokens and cost of a run.

    The provider counts the tokens. `cost_usd` is None while no price is known. The latencies of the model
    calls, with their retries, are known when the run has ended. The class is not frozen,
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
    llm_latency_p50_ms: float | None = None
    llm_latency_p95_ms: float | None = None
    llm_retry_count: int = 0

    def plus(self, delta: RunUsage) -> RunUsage:
        """The sum of two usages. No count exceeds 2^53. `ttft_ms` is the first known one."""
        total, more = dict(self.__dict__), delta.__dict__
        for name in _COUNTS:  # most of them do not change
            if more[name] or total[name] > LARGEST_COUNT:
                total[name] = min(total[name] + more[name], LARGEST_COUNT)
        costs = total["cost_breakdown"] = dict(total["cost_breakdown"])
        for name, usd in more["cost_breakdown"].items():
            costs[name] = round(costs.get(name, 0.0) + usd, 12)
        cost, cost_of_more = total["cost_usd"], more["cost_usd"]
        if cost is not None or cost_of_more is not None:
            total["cost_usd"] = round((cost or 0.0) + (cost_of_more or 0.0), 12)
        if total["ttft_ms"] is None:
            total["ttft_ms"] = more["ttft_ms"]
        return _made_of(total)

    def minus(self, part: RunUsage) -> RunUsage:
        """What is left of this usage without a part of it. Nothing is below 0, and the times stay."""
        left, less = dict(self.__dict__), part.__dict__
        for name in _COUNTS:
            left[name] = max(0, left[name] - less[name])
        left["cost_breakdown"] = {
            name: max(0.0, round(usd - less["cost_breakdown"].get(name, 0.0), 12))
            for name, usd in left["cost_breakdown"].items()
        }
        if left["cost_usd"] is not None:
            left["cost_usd"] = max(0.0, round(left["cost_usd"] - (less["cost_usd"] or 0.0), 12))
        return _made_of(left)

    def with_latencies(self, p50_ms: float, p95_ms: float) -> RunUsage:
        """The usage with the median and the 95th percentile of the durations of model calls."""
        return _made_of({**self.__dict__, "llm_latency_p50_ms": p50_ms, "llm_latency_p95_ms": p95_ms})

    def counted(self) -> dict[str, Any]:
        """The fields that are neither 0, nor empty, nor unknown."""
        fields = self.__dict__
        return dict(compress(fields.items(), fields.values()))

    def known(self) -> dict[str, Any]:
        """The fields that differ from their defaults: what was counted, and the costs that are known."""
        fields = self.__dict__
        if fields["cost_usd"] == 0 or fields["ttft_ms"] == 0:  # known, although nothing was counted
            return {
                name: value
                for name, value in fields.items()
                if value or (value is not None and name in _OPTIONAL)
            }
        return dict(compress(fields.items(), fields.values()))


NO_USAGE = RunUsage()
"""The usage of what has used nothing. It is shared, so nobody may change it."""
ONE_TOOL_CALL = RunUsage(tool_calls=1)
"""The usage of one call of a tool. It is shared, too."""
_OPTIONAL = frozenset(name for name, field in RunUsage.model_fields.items() if field.default is None)
_COUNTS = tuple(name for name, field in RunUsage.model_fields.items() if field.annotation is int)
_FIELDS = frozenset(RunUsage.model_fields)


_nothing = RunUsage().__dict__


def usage_of(**counted: Any) -> RunUsage:
    """The usage with these fields. They are not validated: the caller has made values of their types.

    >>> usage_of(tool_calls=1) == RunUsage(tool_calls=1)
    True
    """
    return _made_of({**_nothing, "cost_breakdown": {}, **counted})


def _made_of(fields: dict[str, Any]) -> RunUsage:
    """The usage with exactly these fields, which have their types already."""
    usage = RunUsage.__new__(RunUsage)
    set_attribute = object.__setattr__  # pydantic's own one looks the field up
    set_attribute(usage, "__dict__", fields)
    set_attribute(usage, "__pydantic_fields_set__", set(_FIELDS))
    set_attribute(usage, "__pydantic_extra__", None)
    set_attribute(usage, "__pydantic_private__", None)
    return usage
