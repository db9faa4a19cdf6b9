"""Prices: the only place that computes what a call costs, and estimates tokens that were not counted.

A cost that the provider states counts. Otherwise the rates of the agent's `pricing`, then those of the table
`prices.json`, which `docs/prices.py` writes. Without all rates that a call needs, its cost is unknown: None.

Calls of tools that the provider executes are billed beside the tokens, such as web searches (`FEES`).
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
from openagents_worker.models.media import MEDIA_TOKENS, without_media

__all__ = [
    "ANYWHERE",
    "FEES",
    "estimate_tokens",
    "estimate_usage",
    "price",
    "price_table",
    "region_of",
]

PARTS = (
    "input",
    "cached_read",
    "cached_audio",
    "cached_write",
    "cached_write_long",
    "image",
    "audio",
    "output",
    "reasoning",
    "output_audio",
)
_OF_OUTPUT = ("reasoning", "output_audio")
FEES = {
    "web_search": "web_search_calls",
    "file_search": "file_search_calls",
    "image_generation": "image_generation_calls",
    "code_interpreter": "code_interpreter_containers",
}
"""What is billed in USD each: the part of the cost, and its number in the metadata of a usage."""

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

ANYWHERE = frozenset({"", "global", "not_available"})
"""Values of `inference_geo` that change no price."""
_OPENAI_REGION = re.compile(r"https?://([a-z]{2,10})\.api\.openai\.com(?=[:/?]|$)", re.IGNORECASE)

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
    None if a required rate is unknown; `unpriced_parts` then names what has no rate. `input_tokens` includes
    the tokens that were read from and written to the provider's cache, and those of images; `output_tokens`
    includes the reasoning.
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
        region=region if isinstance(region, str) and region not in ANYWHERE else None,
        input_tokens=usage.input_tokens,
    )
    breakdown: dict[str, float] = {}
    unknown: list[str] = []
    for part, number in (_tokens_by_part(usage, rates) | _fees(usage)).items():
        if number and (rate := rates[part]) is not None:
            breakdown[part] = round(number * rate if part in FEES else number * rate / 1_000_000, 12)
        elif number:
            unknown.append(part)
    if unknown:
        return _with_cost(usage, None, breakdown, unpriced_parts=unknown)
    return _with_cost(usage, round(sum(breakdown.values()), 12), breakdown)


def region_of(url: str | None) -> str | None:
    """The region of an address of OpenAI, whose tokens may cost more there. None: it has no region.

    >>> region_of("https://eu.api.openai.com/v1"), region_of("https://api.openai.com/v1")
    ('eu', None)
    """
    found = _OPENAI_REGION.match(url or "")
    return found[1].lower() if found else None


def _with_cost(
    usage: LLMUsage, cost: float | None, breakdown: Mapping[str, float | None], **more: Any
) -> LLMUsage:
    metadata = {**usage.metadata, "cost_usd": cost, "cost_breakdown": breakdown, **more}
    return LLMUsage(usage.input_tokens, usage.output_tokens, usage.total_tokens, metadata)


def _tokens_by_part(usage: LLMUsage, rates: Rates) -> dict[str, int]:
    """The tokens of a call by part. A part with the rate of the whole it belongs to is not counted apart.

    Parts without tokens may be left out.
    """
    if not usage.metadata:
        return {"input": usage.input_tokens, "output": usage.output_tokens}
    counted = {
        "cached_read": _count(usage, "cached_tokens"),
        "cached_audio": _count(usage, "cached_audio_tokens"),
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
    # Audio from the cache is part of both counts. Without a rate of audio, it costs what other tokens cost.
    counted["cached_audio"] = min(counted[part] for part in ("cached_audio", "cached_read", "audio"))
    counted |= {part: counted[part] - counted["cached_audio"] for part in ("cached_read", "audio")}
    long = min(counted["cached_write_long"], counted["cached_write"])
    counted |= {"cached_write": counted["cached_write"] - long, "cached_write_long": long}
    apart = sum(number for part, number in counted.items() if part not in _OF_OUTPUT)
    counted["input"] = max(0, usage.input_tokens - apart)
    counted["output"] = usage.output_tokens
    for part in _OF_OUTPUT:
        counted[part] = min(counted[part], counted["output"])
        counted["output"] -= counted[part]
    return {part: counted[part] for part in PARTS}


def _fees(usage: LLMUsage) -> dict[str, int]:
    """What is billed beside the tokens, by part."""
    if not usage.metadata:
        return {}
    return {part: number for part, name in FEES.items() if (number := _count(usage, name))}


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
    entry = _entry_of(model, served)
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
    entry = _entry_of(model, served)
    table = dict(_rates_by_rising_priority(entry, tier, above))
    factor = _factor(entry, region)
    own = overrides or LLMPricing()
    rates: dict[str, float | None] = {}
    for part in (*PARTS, *FEES):
        rate, listed = getattr(own, part, None), table.get(part)
        if rate is None and listed is not None:
            rate = listed if part in FEES else None if factor is None else listed * factor
        rates[part] = rate
    for part, whole in _OTHERWISE.items():
        # An agent's own rate for the input says nothing about its cache.
        is_in_table = entry and getattr(own, whole, None) is None
        if rates[part] is None and (is_in_table or part in ("image", "audio", *_OF_OUTPUT)):
            rates[part] = rates[whole]
    return rates


def _factor(entry: Mapping[str, Any], region: str | None) -> float | None:
    """What the rates of tokens are multiplied by in a region. None: it is not known. `*` stands for all
    regions that are not listed."""
    regions: Mapping[str, float] = entry.get("regions") or {}
    return regions.get(region, regions.get("*")) if region is not None and regions else 1.0


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


def _entry_of(model: str, served: str | None) -> Mapping[str, Any]:
    """The entry of a model, or else of the one that the reply names. {}: the table knows neither."""
    if served is None or (_is_tuned(model) and not _is_tuned(served)):  # it costs more than its base
        return _entry(model) or {}
    return _entry(model) or _entry(served) or {}


def _entry(model: str) -> dict[str, Any] | None:
    """The entry of a model in the table; a dated snapshot has that of its model, unless it is listed.

    All models that are tuned from the same base have one: `ft:gpt-4.1-2025-04-14:org:name:id`.
    """
    name = model.lower().removeprefix("models/")
    table = price_table()
    if _is_tuned(name):
        return table.get(":".join(name.split(":")[:2]))
    return table.get(name) or table.get(_SNAPSHOT.sub("", name))


def _is_tuned(model: str) -> bool:
    """Whether the name is one that OpenAI gives to a model that was fine-tuned."""
    return model.lower().startswith("ft:")


def estimate_tokens(text: str) -> int:
    """The estimated number of tokens in a text: one per four characters, at least one."""
    return max(1, len(text) // 4)


def estimate_usage(messages: Sequence[Message], answer: str) -> LLMUsage:
    """The estimated usage of a call whose provider did not count tokens. An image or a file counts with
    `MEDIA_TOKENS`, however many bytes it has."""
    contents = [without_media(message.get("content")) for message in messages]
    texts = [
        _text(content) + _text(message.get("tool_calls"))
        for message, (content, _) in zip(messages, contents, strict=True)
    ]
    input_tokens = estimate_tokens("".join(texts)) + MEDIA_TOKENS * sum(media for _, media in contents)
    output_tokens = estimate_tokens(answer)
    return LLMUsage(input_tokens, output_tokens, total_tokens=input_tokens + output_tokens)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value) if value else ""
