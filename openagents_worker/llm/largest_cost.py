"""The largest cost of a request: the only place that estimates it before the request is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openagents_worker.agents import LLMOptions
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import LLMUsage, ModelRequest
from openagents_worker.llm.limits import REPLY_TOKENS
from openagents_worker.llm.pricing import estimate_tokens, price, region_of
from openagents_worker.models.media import MEDIA_TOKENS

__all__ = ["largest_cost_usd"]

LONG_LIFETIMES = ("1h", "12h")
"""Lifetimes in a cache with prices of their own: Anthropic's and OpenAI's."""


def largest_cost_usd(request: ModelRequest, model: str, options: LLMOptions) -> float | None:
    """What a request costs in USD if its reply is as long as `max_tokens` allows; None: no price is known.

    The tokens of the request are estimated. None of them is read from the provider's cache at a lower price;
    all are written to it if that has a higher price. Without `max_tokens`, the reply counts with
    `REPLY_TOKENS`. The service tier and the region of the agent count. Nobody knows how
    often a tool of the provider will be used, so its fees do not count.
    """
    asked = sum(map(_tokens_of, request.messages))
    if request.tools:
        asked += estimate_tokens(dumps(list(request.tools)))
    answered = request.max_tokens or options.max_tokens or REPLY_TOKENS
    changes = _what_changes_the_price(options)
    costs: list[float | None] = []
    without: dict[str, int] = {}
    for written in (without, _written_to_cache(asked, options)):
        usage = LLMUsage(asked, answered, asked + answered, changes | written)
        costs.append(price(model, usage, options.pricing).metadata["cost_usd"])
    return max((cost for cost in costs if cost is not None), default=None)


def _written_to_cache(tokens: int, options: LLMOptions) -> dict[str, int]:
    """The tokens that a request may write to the provider's cache: OpenAI's newer models do it unasked."""
    extras = options.model_extra or {}
    if options.provider == "anthropic" and extras.get("prompt_caching") is False:
        return {}
    cache = extras.get("prompt_cache_options")
    lifetime = extras.get("cache_ttl") or (cache.get("ttl") if isinstance(cache, Mapping) else None)
    long = tokens if lifetime in LONG_LIFETIMES else 0
    return {"cache_creation_input_tokens": tokens, "cache_creation_1h_input_tokens": long}


def _what_changes_the_price(options: LLMOptions) -> dict[str, Any]:
    """The service tier and the region that the agent asks for."""
    extras = options.model_extra or {}
    tier = "fast" if extras.get("speed") == "fast" else extras.get("service_tier")
    region = extras.get("inference_geo") or region_of(options.api_base)
    return {"service_tier": tier, "inference_geo": region}


def _tokens_of(message: Mapping[str, Any]) -> int:
    content, calls = message.get("content") or "", message.get("tool_calls")
    tokens = estimate_tokens(dumps(calls)) if calls else 0
    if isinstance(content, str):
        return tokens + estimate_tokens(content)
    if isinstance(content, Sequence):
        return tokens + sum(map(_tokens_of_part, content))
    return tokens + estimate_tokens(dumps(content))


def _tokens_of_part(part: Any) -> int:
    text = part.get("text") if isinstance(part, Mapping) else part
    return estimate_tokens(text) if isinstance(text, str) else MEDIA_TOKENS
