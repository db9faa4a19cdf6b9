"""Prices: the only place that computes what a call costs, and estimates tokens that were not counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from openagents_worker.agents import LLMPricing
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import LLMUsage, Message, token_count

__all__ = ["PRICES", "estimate_tokens", "estimate_usage", "price"]

# USD per million tokens, standard tier, from https://platform.openai.com/docs/pricing, read in May 2025.
PRICES = {
    "gpt-4o": LLMPricing(input=2.50, output=10.00, cached_read=1.25),
    "gpt-4o-2024-05-13": LLMPricing(input=5.00, output=15.00),  # first snapshot: higher price, no cache
    "gpt-4o-mini": LLMPricing(input=0.15, output=0.60, cached_read=0.075),
    "o1": LLMPricing(input=15.00, output=60.00, cached_read=7.50),
}

_SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")  # gpt-4o-2024-08-06 costs what gpt-4o costs


def price(model: str, usage: LLMUsage, overrides: LLMPricing | None = None) -> LLMUsage:
    """The usage with `cost_usd` and `cost_breakdown` (USD by part) added to its metadata.

    A rate in `overrides` takes precedence over the table. `cost_usd` is None if a required rate is unknown.
    `input_tokens` includes the tokens that were read from and written to the provider's cache.
    """
    tokens = _tokens_by_part(usage)
    rates = _rates(model, overrides)
    breakdown = {
        part: round(number * rate / 1_000_000, 12)
        for part, number in tokens.items()
        if number and (rate := rates[part]) is not None
    }
    known = all(rates[part] is not None for part, number in tokens.items() if number)
    cost = round(sum(breakdown.values()), 12) if known else None
    return replace(usage, metadata={**usage.metadata, "cost_usd": cost, "cost_breakdown": breakdown})


def _tokens_by_part(usage: LLMUsage) -> dict[str, int]:
    read = token_count(usage.metadata.get("cached_tokens"))
    written = token_count(usage.metadata.get("cache_creation_input_tokens"))
    return {
        "input": max(0, usage.input_tokens - read - written),
        "cached_read": read,
        "cached_write": written,
        "output": usage.output_tokens,
    }


@lru_cache  # an agent's model and prices are the same at every call
def _rates(model: str, overrides: LLMPricing | None) -> dict[str, float | None]:
    """USD per million tokens by part; None: unknown."""
    table_rates = PRICES.get(model) or PRICES.get(_SNAPSHOT.sub("", model)) or LLMPricing()
    own_rates = overrides or LLMPricing()
    return {
        part: own if (own := getattr(own_rates, part)) is not None else getattr(table_rates, part)
        for part in ("input", "cached_read", "cached_write", "output")
    }


def estimate_tokens(text: str) -> int:
    """The estimated number of tokens in a text: one per four characters, at least one."""
    return max(1, len(text) // 4)


def estimate_usage(messages: Sequence[Message], answer: str) -> LLMUsage:
    """The estimated usage of a call whose provider did not count tokens."""
    input_tokens = estimate_tokens("".join(_text(message) for message in messages))
    output_tokens = estimate_tokens(answer)
    return LLMUsage(input_tokens, output_tokens, total_tokens=input_tokens + output_tokens)


def _text(message: Message) -> str:
    content = message.get("content") or ""
    calls = message.get("tool_calls")
    return (content if isinstance(content, str) else dumps(content)) + (dumps(calls) if calls else "")
