"""Token counts: the only place that reads from a reply what is billed, in every spelling that providers have.

Counts follow one rule: `input_tokens` includes the tokens that were read from and written to the provider's
cache, and `output_tokens` includes the reasoning. Providers that count these apart are converted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from openagents_worker.jsontext import LARGEST_COUNT
from openagents_worker.llm.base import LLMUsage, token_count
from openagents_worker.llm.pricing import ANYWHERE

__all__ = ["COST_HEADERS", "stated_cost", "tools_of_message", "tools_of_response", "usage_from_wire"]

COST_HEADERS = ("x-litellm-response-cost", "x-response-cost", "x-request-cost")
"""Headers in which gateways state what a call cost, in USD."""
TICKS_PER_USD = 10_000_000_000  # of xAI's `cost_in_usd_ticks`

# Every spelling of a count: the names of nested objects and the name of the number.
_INPUT = (("prompt_tokens",), ("input_tokens",))
_OUTPUT = (("completion_tokens",), ("output_tokens",))
_CACHE_READ = (
    ("prompt_tokens_details", "cached_tokens"),
    ("input_tokens_details", "cached_tokens"),
    ("prompt_cache_hit_tokens",),
    ("cache_read_input_tokens",),
    ("cached_tokens",),
    ("cached_content_token_count",),
)
_CACHE_WRITTEN = (
    ("cache_creation_input_tokens",),
    ("prompt_tokens_details", "cache_write_tokens"),
    ("prompt_tokens_details", "cache_creation_tokens"),
    ("prompt_tokens_details", "cache_creation_input_tokens"),
    ("input_tokens_details", "cache_write_tokens"),
    ("cache_write_input_tokens",),
)
_REASONING = (
    ("completion_tokens_details", "reasoning_tokens"),
    ("output_tokens_details", "reasoning_tokens"),
    ("output_tokens_details", "thinking_tokens"),
    ("reasoning_tokens",),
)
_IMAGE = (("prompt_tokens_details", "image_tokens"), ("input_tokens_details", "image_tokens"))
_AUDIO = (("prompt_tokens_details", "audio_tokens"), ("input_tokens_details", "audio_tokens"))
_CACHED_AUDIO = (
    ("prompt_tokens_details", "cached_tokens_details", "audio_tokens"),
    ("input_tokens_details", "cached_tokens_details", "audio_tokens"),
    ("prompt_tokens_details", "cached_audio_tokens"),
)
_WEB_SEARCHES = (("server_tool_use", "web_search_requests"),)
_LONG_CACHE = (
    ("cache_creation", "ephemeral_1h_input_tokens"),
    ("prompt_tokens_details", "cache_creation", "ephemeral_1h_input_tokens"),
    ("prompt_tokens_details", "cache_creation_token_details", "ephemeral_1h_input_tokens"),
    ("input_tokens_details", "cache_write_tokens_details", "ttl_12h_tokens"),
    ("prompt_tokens_details", "cache_write_tokens_details", "ttl_12h_tokens"),
)
_OUTPUT_AUDIO = (("completion_tokens_details", "audio_tokens"), ("output_tokens_details", "audio_tokens"))
_SEARCHES = re.compile(r"gpt-[^/]*-search-(preview|api)")


def usage_from_wire(
    usage: Any,
    *,
    cache_is_apart: bool | None = None,
    service_tier: Any = None,
    used_tools: Mapping[str, int] | None = None,
) -> LLMUsage | None:
    """The counts of a reply. None: the provider did not count, or sent only zeros.

    `cache_is_apart`: whether the input count leaves out the tokens of the cache, as Anthropic's does. None:
    found out from the total. `service_tier`: the tier that served the request, which decides its price.
    `used_tools`: how often the reply says that tools of the provider were used, by the names of
    `pricing.FEES`, if the usage does not count them.
    """
    if not isinstance(usage, Mapping):
        return None
    if usage.get("iterations"):
        usage = _with_compactions(usage)
    given, output = _count(usage, _INPUT), _count(usage, _OUTPUT)
    read, written = _count(usage, _CACHE_READ), _count(usage, _CACHE_WRITTEN)
    reasoning, total = _count(usage, _REASONING), token_count(usage.get("total_tokens"))
    beyond = total - given - output
    if cache_is_apart is None:
        cache_is_apart = read + written > given or (beyond > 0 and beyond == read + written)
    if cache_is_apart:
        input_tokens = given + read + written
    else:
        input_tokens = given
        if beyond > 0:  # Gemini and xAI count reasoning only in the total
            output += beyond
    if not (input_tokens or output):
        return None
    metadata = {
        "cached_tokens": read,
        "cache_creation_input_tokens": written,
        "cache_creation_1h_input_tokens": _count(usage, _LONG_CACHE),
        "reasoning_tokens": reasoning,
        "image_tokens": _count(usage, _IMAGE),
        "audio_tokens": _count(usage, _AUDIO),
        "cached_audio_tokens": _count(usage, _CACHED_AUDIO),
        "output_audio_tokens": _count(usage, _OUTPUT_AUDIO),
        "stated_cost_usd": _cost_in(usage),
        "service_tier": _tier(usage, service_tier),
        "inference_geo": _geo(usage),
        **(used_tools or {}),
    }
    if searches := _count(usage, _WEB_SEARCHES):
        metadata["web_search_calls"] = searches
    return LLMUsage(
        input_tokens,
        output,
        max(total, input_tokens + output),
        {name: value for name, value in metadata.items() if value not in (0, None)},
    )


def _with_compactions(usage: Mapping[str, Any]) -> Mapping[str, Any]:
    """The counts with those of Anthropic's compactions, which the counts of the reply leave out.

    https://docs.anthropic.com/en/docs/build-with-claude/compaction
    """
    iterations = usage["iterations"] if isinstance(usage["iterations"], list) else ()
    compactions = [
        each for each in iterations if isinstance(each, Mapping) and each.get("type") == "compaction"
    ]
    if not compactions:
        return usage
    names = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    counted = [usage, *compactions]
    total: dict[str, Any] = {
        **usage,
        **{name: sum(token_count(each.get(name)) for each in counted) for name in names},
    }
    return total | {
        "cache_creation": {_LONG_CACHE[0][-1]: sum(_count(each, _LONG_CACHE) for each in counted)}
    }


def _tier(usage: Mapping[str, Any], service_tier: Any) -> str | None:
    """The tier that decides the price. Anthropic's fast mode is one: it has prices of its own."""
    if usage.get("speed") == "fast":
        return "fast"
    return service_tier if isinstance(service_tier, str) else None


def _geo(usage: Mapping[str, Any]) -> str | None:
    """The region of Anthropic in which the model ran, if it may have prices of its own."""
    region = usage.get("inference_geo")
    return region if isinstance(region, str) and region not in ANYWHERE else None


# --- tools of the provider -------------------------------------------------------------------------------


def tools_of_response(body: Mapping[str, Any]) -> dict[str, int]:
    """How often OpenAI's responses API says that tools of the provider were used which it bills.

    Of the actions of a web search, only the search itself is billed, not a page that is opened. Code is
    executed in containers, which several calls share.
    """
    items = [item for item in body["output"] if isinstance(item, Mapping)]
    kinds = Counter(str(item.get("type")) for item in items if _is_billed(item))
    boxes = {str(item.get("container_id")) for item in items if item.get("type") == "code_interpreter_call"}
    # Bedrock counts the searches.
    searches = token_count(_value_at(body, ("tool_usage", "web_search", "num_requests")))
    found = {
        "web_search_calls": searches or kinds["web_search_call"],
        "file_search_calls": kinds["file_search_call"],
        "image_generation_calls": kinds["image_generation_call"],
        "code_interpreter_containers": len(boxes),
    }
    return {name: number for name, number in found.items() if number}


def _is_billed(item: Mapping[str, Any]) -> bool:
    return item.get("type") != "web_search_call" or _value_at(item, ("action", "type")) in (None, "search")


def tools_of_message(message: Mapping[str, Any], model: str | None) -> dict[str, int]:
    """The web search of a chat completion: one, because no reply counts them.

    OpenAI's models for it search for each reply. Others cite what they have found.
    """
    citations = message.get("annotations")
    has_searched = isinstance(citations, list) and any(
        isinstance(each, Mapping) and each.get("type") == "url_citation" for each in citations
    )
    return {"web_search_calls": 1} if has_searched or _SEARCHES.match(model or "") else {}


# --- stated costs ----------------------------------------------------------------------------------------


def stated_cost(headers: Mapping[str, str]) -> float | None:
    """The cost in USD that a gateway states in the headers of its reply; None if it states none.

    Zero is none: LiteLLM's proxy writes 0.0 if it does not know the price, and for every streamed reply,
    whose tokens are not counted yet.
    """
    return next((cost for name in COST_HEADERS if (cost := _amount(headers.get(name)))), None)


def _cost_in(usage: Mapping[str, Any]) -> float | None:
    """The cost that the provider states: OpenRouter's `cost`, Perplexity's object of this name, DeepInfra's
    `estimated_cost`, xAI's ticks.

    For a request with the account's own key at the model's vendor (`is_byok`), OpenRouter's `cost` is only
    its fee: the vendor bills the rest. Without the vendor's share, the cost is not known.
    """
    if (ticks := _amount(usage.get("cost_in_usd_ticks"))) is not None:
        return ticks / TICKS_PER_USD
    cost = usage.get("cost")
    cost = cost.get("total_cost") if isinstance(cost, Mapping) else cost
    named = (usage.get(name) for name in ("cost_usd", "total_cost", "estimated_cost"))
    stated = next((amount for each in (cost, *named) if (amount := _amount(each)) is not None), None)
    if usage.get("is_byok") is not True:
        return stated
    of_vendor = _amount(_value_at(usage, ("cost_details", "upstream_inference_cost")))
    return None if of_vendor is None else of_vendor + (stated or 0.0)


def _amount(value: Any) -> float | None:
    """An amount that is not negative; None for anything else."""
    if value is None or isinstance(value, bool):
        return None
    try:
        amount = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return amount if 0 <= amount <= LARGEST_COUNT else None


def _count(usage: Mapping[str, Any], spellings: tuple[tuple[str, ...], ...]) -> int:
    """The first count above zero among the spellings."""
    return next((count for path in spellings if (count := token_count(_value_at(usage, path)))), 0)


def _value_at(usage: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = usage
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
