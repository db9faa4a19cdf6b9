"""The usage of a model call: the only place that joins what its requests have used.

A request may be billed although its reply is not an answer: the model wrote a tool call that cannot be read,
or the server gave the reply up. Such a request is repeated, and what it has used belongs to the call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from openagents_worker.errors import LLMError
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import LLMResponse, LLMUsage, Message
from openagents_worker.llm.pricing import estimate_usage
from openagents_worker.llm.usage import stated_cost

if TYPE_CHECKING:  # it loads the HTTP client, which an agent without such a model does not need
    from openagents_worker.llm.reading import Exchange

__all__ = ["estimated_usage", "joined_usage", "measures_of", "usage_of_errors"]

_SUMS = ("cached_tokens", "cache_creation_input_tokens", "cache_creation_1h_input_tokens", "reasoning_tokens")


def joined_usage(usages: Sequence[LLMUsage]) -> LLMUsage | None:
    """The usage of several requests as that of one call; None if nothing was counted. A cost that is not
    known makes the whole cost unknown. Other measurements are those of the last one."""
    if len(usages) < 2:
        return usages[0] if usages else None
    every = [usage.metadata for usage in usages]
    costs = [metadata.get("cost_usd") for metadata in every]
    metadata: dict[str, Any] = {**every[-1], **_sums(every, _SUMS)}
    if any("cost_usd" in each for each in every):
        known = [cost for cost in costs if cost is not None]
        metadata["cost_usd"] = round(sum(known), 12) if len(known) == len(costs) else None
        parts = [each.get("cost_breakdown") or {} for each in every]
        metadata["cost_breakdown"] = _sums(parts, dict.fromkeys(name for part in parts for name in part))
    return LLMUsage(
        sum(usage.input_tokens for usage in usages),
        sum(usage.output_tokens for usage in usages),
        sum(usage.total_tokens for usage in usages),
        metadata,
    )


def _sums(counted: Sequence[Mapping[str, Any]], names: Any) -> dict[str, Any]:
    sums = {name: sum(each.get(name) or 0 for each in counted) for name in names}
    return {name: round(number, 12) for name, number in sums.items() if number}


def usage_of_errors(errors: Sequence[LLMError]) -> list[LLMUsage]:
    """What the failed requests have used, of those whose replies were counted."""
    return [error.usage for error in errors if isinstance(error.usage, LLMUsage)]


def estimated_usage(messages: Sequence[Message], reply: LLMResponse) -> LLMUsage:
    """The usage for a server that does not count tokens: a budget with estimates is better than none."""
    reply_text = reply.output_text + "".join(dumps(dict(call.arguments)) for call in reply.tool_calls)
    return replace(estimate_usage(messages, reply_text), metadata={"estimated": True})


def measures_of(exchange: Exchange, usage: LLMUsage) -> dict[str, Any]:
    """The measurements of a call, for its usage: `ttft_ms`, `tokens_per_s`, `retries`, and a stated cost."""
    measures = dict(exchange.measures)
    ttft_ms, took_ms = measures.get("ttft_ms"), exchange.took_ms
    if ttft_ms is not None and usage.output_tokens > 1 and took_ms > ttft_ms:
        measures["tokens_per_s"] = round((usage.output_tokens - 1) / (took_ms - ttft_ms) * 1000, 1)
    costs = [*exchange.part_costs, stated_cost(exchange.headers)]
    if len(stated := [cost for cost in costs if cost is not None]) == len(costs):
        measures["stated_cost_usd"] = sum(stated)
    return measures
