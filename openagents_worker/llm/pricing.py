"""Prices: the only place that computes what a call costs, and estimates tokens that were not counted.

A cost that the provider states counts. Otherwise the rates of the agent's `pricing`, then those of the table
`prices.json`, which `docs/prices.py` writes. Without all rates that a call needs, its cost is unknown: None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from openagents_worker.agents import LLMPricing
from openagents_worker.jsontext import LARGEST_COUNT, dumps
from openagents_worker.llm.base import LLMUsage, Message, token_count

__all__ = ["MEDIA_TOKENS", "estimate_tokens", "estimate_usage", "price", "price_table"]

PARTS = (
    "input",
    "cached_read",
    "cached_write",
    "cached_write_long",
    "image",
    "audio",
    "output",
    "reasoning",
    "output_audio",
)
_OF_OUTPUT = ("reasoning", "output_audio")

SERVICE_TIERS = frozenset({"flex", "priority", "fast", "ultrafast"})
"""Service tiers with prices of their own. Other tiers cost what the standard tier costs."""
_OTHER_NAMES = {"fast": "priority"}
"""OpenAI's two names of one tier. For Anthropic's models, `fast` is a tier of its own."""
_NEVER_STANDARD = frozenset({"fast", "ultrafast"})
"""Tiers that cost a multiple of the standard tier: without rates of their own, the cost is not known."""
_OTHERWISE = {
    "cached_read": "input",
    "cached_write": "input",
    "cached_write_long": "cached_write",
    "image": "input",
    "audio": "input",
    "reasoning": "output",
    "output_audio": "output",
}
"""The rate of the table that counts if a model has no rate for a part."""
_SNAPSHOT = re.compile(r"-(\d{4}-\d{2}-\d{2}|\d{8}|latest)$")  # gpt-4o-2024-08-06 costs what gpt-4o costs

MEDIA_TOKENS = 1_500
"""Tokens of an image or a file in a message: its bytes say nothing about them."""
_MEDIA = frozenset(
    {
        "audio",
        "document",
        "file",
        "image",
        "image_url",
        "input_audio",
        "input_file",
        "input_image",
        "video_url",
    }
)
"""The types of these parts, in the neutral format and in those of the providers."""

Rates = Mapping[str, float | None]


@cache
def price_table() -> dict[str, dict[str, Any]]:
    """The table: rates in USD per million tokens by the name of the model. It is read at the first call."""
    text = files("openagents_worker.llm").joinpath("prices.json").read_text()
    models: dict[str, dict[str, Any]] = json.loads(text)["models"]
    return models


def price(
    model: str, usage: LLMUsage, overrides: LLMPricing | None = None, *, served: str | None = None
) -> LLMUsage:
    """The usage with `cost_usd` and `cost_breakdown` (USD by part) added to its metadata.

    `served` is the model that the reply names; it counts if the table does not know `model`. `cost_usd` is
    None if a required rate is unknown. `input_tokens` includes the tokens that were read from and written to
    the provider's cache, and those of images; `output_tokens` includes the reasoning.
    """
    stated = usage.metadata.get("stated_cost_usd")
    if isinstance(stated, int | float) and not isinstance(stated, bool) and 0 <= stated <= LARGEST_COUNT:
        cost: float | None = round(float(stated), 12)
        return _with_cost(usage, cost, {"stated": cost})
    tier = usage.metadata.get("service_tier")
    tier = tier if isinstance(tier, str) and tier in SERVICE_TIERS else None
    region = usage.metadata.get("inference_geo")
    rates = _rates(
        model,
        served,
        overrides,
        tier=tier,
        region=region if isinstance(region, str) else None,
        input_tokens=usage.input_tokens,
    )
    breakdown: dict[str, float] = {}
    is_known = True
    for part, number in _tokens_by_part(usage, rates).items():
        if number and (rate := rates[part]) is not None:
            breakdown[part] = round(number * rate / 1_000_000, 12)
        elif number:
            is_known = False
    return _with_cost(usage, round(sum(breakdown.values()), 12) if is_known else None, breakdown)


def _with_cost(usage: LLMUsage, cost: float | None, breakdown: Mapping[str, float | None]) -> LLMUsage:
    metadata = {**usage.metadata, "cost_usd": cost, "cost_breakdown": breakdown}
    return LLMUsage(usage.input_tokens, usage.output_tokens, usage.total_tokens, metadata)


def _tokens_by_part(usage: LLMUsage, rates: Rates) -> dict[str, int]:
    """The tokens of a call by part. A part with the rate of the whole it belongs to is not counted apart.

    Parts without tokens may be left out.
    """
    if not usage.metadata:
        return {"input": usage.input_tokens, "output": usage.output_tokens}
    counted = {
        "cached_read": _count(usage, "cached_tokens"),
        "cached_write": _count(usage, "cache_creation_input_tokens"),
        "cached_write_long": _count(usage, "cache_creation_1h_input_tokens"),
        "image": _count(usage, "image_tokens"),
        "audio": _count(usage, "audio_tokens"),
        "reasoning": _count(usage, "reasoning_tokens"),
        "output_audio": _count(usage, "output_audio_tokens"),
    }
    for part in ("image", "audio", *_OF_OUTPUT):
        if rates[part] == rates[_OTHERWISE[part]]:
            counted[part] = 0
    long = min(counted["cached_write_long"], counted["cached_write"])
    counted |= {"cached_write": counted["cached_write"] - long, "cached_write_long": long}
    apart = sum(number for part, number in counted.items() if part not in _OF_OUTPUT)
    counted["input"] = max(0, usage.input_tokens - apart)
    counted["output"] = usage.output_tokens
    for part in _OF_OUTPUT:
        counted[part] = min(counted[part], counted["output"])
        counted["output"] -= counted[part]
    return {part: counted[part] for part in PARTS}


def _count(usage: LLMUsage, name: str) -> int:
    return token_count(usage.metadata.get(name))


def _rates(
    model: str,
    served: str | None,
    overrides: LLMPricing | None,
    *,
    tier: str | None,
    region: str | None,
    input_tokens: int,
) -> Rates:
    """USD per million tokens by part; None: unknown."""
    limits = _limits_of(model, served)
    limit = max((limit for limit in limits if input_tokens > limit), default=0) if limits else 0
    return _rates_of(model, served, overrides, tier, region, limit)


@lru_cache
def _limits_of(model: str, served: str | None) -> tuple[int, ...]:
    """The numbers of input tokens above which a model has other rates."""
    entry = _entry(model) or (_entry(served) if served else None) or {}
    return tuple(int(limit) for limit in entry.get("above", ()))


@lru_cache  # an agent's model and prices are the same at every call
def _rates_of(
    model: str,
    served: str | None,
    overrides: LLMPricing | None,
    tier: str | None,
    region: str | None,
    above: int,
) -> Rates:
    entry = _entry(model) or (_entry(served) if served else None) or {}
    table = dict(_rates_by_rising_priority(entry, tier, above))
    factor = entry.get("regions", {}).get(region, 1.0)
    own = overrides or LLMPricing()
    rates: dict[str, float | None] = {}
    for part in PARTS:
        rate, listed = getattr(own, part, None), table.get(part)
        rates[part] = rate if rate is not None or listed is None else listed * factor
    for part, whole in _OTHERWISE.items():
        # An agent's own rate for the input says nothing about its cache.
        is_in_table = entry and getattr(own, whole, None) is None
        if rates[part] is None and (is_in_table or part in ("image", "audio", *_OF_OUTPUT)):
            rates[part] = rates[whole]
    return rates


def _rates_by_rising_priority(
    entry: Mapping[str, Any], tier: str | None, above: int
) -> Iterator[tuple[str, Any]]:
    """The rates of an entry as (part, rate) pairs. A later pair overrides an earlier one.

    The order: the base rates, those for long requests, those of the service tier.
    """
    own = (entry.get(tier) or entry.get(_OTHER_NAMES.get(tier, ""))) if tier else None
    groups = [entry, own] if own else [] if tier in _NEVER_STANDARD else [entry]
    for group in groups:
        yield from group.items()
        yield from group.get("above", {}).get(str(above), {}).items()


def _entry(model: str) -> dict[str, Any] | None:
    """The entry of a model in the table; a dated snapshot has that of its model, unless it is listed."""
    name = model.lower().removeprefix("models/")
    table = price_table()
    return table.get(name) or table.get(_SNAPSHOT.sub("", name))


def estimate_tokens(text: str) -> int:
    """The estimated number of tokens in a text: one per four characters, at least one."""
    return max(1, len(text) // 4)


def estimate_usage(messages: Sequence[Message], answer: str) -> LLMUsage:
    """The estimated usage of a call whose provider did not count tokens. An image or a file counts with
    `MEDIA_TOKENS`, however many bytes it has."""
    input_tokens = estimate_tokens("".join(_text(message) for message in messages))
    input_tokens += MEDIA_TOKENS * sum(_is_media(part) for message in messages for part in _parts(message))
    output_tokens = estimate_tokens(answer)
    return LLMUsage(input_tokens, output_tokens, total_tokens=input_tokens + output_tokens)


def _text(message: Message) -> str:
    content = message.get("content") or ""
    calls = message.get("tool_calls")
    if any(map(_is_media, _parts(message))):
        content = [part for part in _parts(message) if not _is_media(part)]
    return (content if isinstance(content, str) else dumps(content)) + (dumps(calls) if calls else "")


def _parts(message: Message) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list | tuple) else ()


def _is_media(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _MEDIA
