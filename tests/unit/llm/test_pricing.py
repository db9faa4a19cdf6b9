"""The cost of a model call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions, LLMPricing
from openagents_worker.jsontext import dumps
from openagents_worker.llm.anthropic_messages import AnthropicClient
from openagents_worker.llm.base import LLMUsage, ModelRequest
from openagents_worker.llm.fallbacks import FallbackClient
from openagents_worker.llm.limits import REPLY_TOKENS
from openagents_worker.llm.mock import MockClient
from openagents_worker.llm.pricing import estimate_tokens, estimate_usage, price


@pytest.mark.parametrize(
    ("model", "usd"),
    [
        ("gpt-4o", 2.5 + 10),
        ("gpt-4o-2024-08-06", 2.5 + 10),
        ("gpt-4o-2024-05-13", 5 + 15),
        ("gpt-4o-mini", 0.15 + 0.6),
        ("o1", 15 + 60),
    ],
)
def test_the_table_prices_a_million_tokens_each_way(model: str, usd: float) -> None:
    """Known models have a price. A dated snapshot has its model's price, unless it is listed itself."""
    usage = price(model, LLMUsage(1_000_000, 1_000_000))

    assert usage.metadata["cost_usd"] == pytest.approx(usd)


def test_cached_tokens_cost_the_cached_rate() -> None:
    """Tokens that were read from the provider's cache are part of the input, with another rate."""
    usage = price("gpt-4o", LLMUsage(1000, 100, 1100, {"cached_tokens": 800}))

    assert usage.metadata["cost_breakdown"] == {
        "input": pytest.approx(200 * 2.5e-6),
        "cached_read": pytest.approx(800 * 1.25e-6),
        "output": pytest.approx(100 * 10e-6),
    }
    assert usage.metadata["cost_usd"] == pytest.approx(0.0005 + 0.001 + 0.001)


def test_each_override_wins_over_the_table() -> None:
    """An agent's `pricing` may set some rates; the table has the others."""
    usage = price("gpt-4o", LLMUsage(1_000_000, 1_000_000), LLMPricing(input=1.0))

    assert usage.metadata["cost_usd"] == pytest.approx(1 + 10)


@pytest.mark.parametrize(
    ("usage", "pricing"),
    [
        (LLMUsage(1, 1), None),
        (LLMUsage(1, 1), LLMPricing(input=1.0)),
        (LLMUsage(10, 1, 11, {"cached_tokens": 5}), LLMPricing(input=1.0, output=1.0)),
    ],
)
def test_a_cost_with_an_unknown_rate_is_unknown(usage: LLMUsage, pricing: LLMPricing | None) -> None:
    """An incomplete cost would be wrong: `cost_usd` is None if any required rate is missing."""
    assert price("my-own-model", usage, pricing).metadata["cost_usd"] is None


def test_a_free_model_costs_nothing() -> None:
    """A rate of 0 is a known rate."""
    usage = price("local", LLMUsage(5, 5), LLMPricing(input=0, output=0))

    assert usage.metadata["cost_usd"] == 0.0


@pytest.mark.defect("B04")
async def test_the_mock_has_its_price() -> None:
    """Cost budgets can be tried offline: `pricing` also applies to the mock."""
    client = MockClient(LLMOptions(pricing=LLMPricing(input=1_000_000, output=0)))

    reply = await client.generate(messages=[{"role": "user", "content": "x" * 12}])

    assert reply.usage is not None
    assert reply.usage.metadata["cost_usd"] == 3.0


def test_tokens_are_estimated_if_the_provider_does_not_count_them() -> None:
    """Four characters per token, at least one. The tool calls of a message count too."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "name": "b", "arguments": {}}]}

    assert estimate_tokens("") == 1
    assert estimate_tokens("a" * 41) == 10
    assert estimate_usage([call], "").input_tokens > 1


# --- before a call ---------------------------------------------------------------------------------------

RATES = {"input": 1_000_000.0, "output": 1_000_000.0}
"""One dollar a token."""
TEXT = {"type": "text", "text": "x" * 40}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "data": "A" * 4_000_000, "media_type": "image/png"},
        {"type": "file", "data": "A" * 4_000_000, "media_type": "application/pdf"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4_000_000}},
    ],
    ids=lambda part: part["type"],
)
def test_the_bytes_of_an_image_are_no_tokens(part: dict[str, Any]) -> None:
    """Counted as text, one picture would use up the budget of a run, and the tokens of all for minutes."""
    message = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}

    assert 1_500 < estimate_usage([message], "").input_tokens < 1_600


@pytest.mark.parametrize(
    ("options", "changed", "usd"),
    [
        ({}, {}, 2 + REPLY_TOKENS),
        ({"max_tokens": 100}, {}, 2 + 100),
        ({"max_tokens": 100}, {"max_tokens": 10}, 2 + 10),
        (
            {"max_tokens": 1},
            {"messages": [{"role": "user", "content": [{"text": "x" * 40}, PICTURE]}]},
            1_511,
        ),
        ({"max_tokens": 1}, {"messages": [{"role": "assistant", "tool_calls": [{"id": "c" * 40}]}]}, 14),
        ({"max_tokens": 1}, {"tools": [SCHEMA]}, 2 + 1 + len(dumps([SCHEMA])) // 4),
        ({"max_tokens": 1}, {"messages": [{"role": "user", "content": None}]}, 2),
    ],
)
def test_the_largest_cost_of_a_request(options: dict[str, Any], changed: dict[str, Any], usd: float) -> None:
    """The tokens of the request, and the reply as long as it may be. A picture counts as a fixed number."""
    client = MockClient(LLMOptions(pricing=LLMPricing(**RATES), **options))
    request = ModelRequest([{"role": "user", "content": "12345678"}])

    assert client.largest_cost_usd(replace(request, **changed)) == usd


def test_a_request_without_a_known_price_has_no_largest_cost() -> None:
    request = ModelRequest([{"role": "user", "content": "hi"}])
    assert MockClient(LLMOptions()).largest_cost_usd(request) is None


def test_anthropic_reserves_what_it_asks_for() -> None:
    """Its API requires `max_tokens`, and the thinking is added to it."""
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 2_000}}
    place = {"provider": "anthropic", "api_base": "http://127.0.0.1:1/v1", "model": "m"}
    options = LLMOptions(**place, pricing=LLMPricing(**RATES), **thinking)
    client = AnthropicClient(options, api_key="k")

    assert client.largest_cost_usd(ModelRequest([{"role": "user", "content": "hi"}])) == 1 + 8_192 + 2_000


@pytest.mark.parametrize(
    ("options", "usd"),
    [
        ({}, 3.75 + 15),
        ({"cache_ttl": "1h"}, 6 + 15),
        ({"prompt_caching": False}, 3 + 15),
        ({"pricing": LLMPricing(input=2.0, output=0.0, cached_write=1.0)}, 2),
    ],
)
def test_anthropic_may_write_the_whole_request_to_its_cache(options: dict[str, Any], usd: float) -> None:
    """At a higher price, unless the cache is off."""
    place = {"provider": "anthropic", "api_base": "http://127.0.0.1:1/v1", "model": "claude-sonnet-4-5"}
    client = AnthropicClient(LLMOptions(**place, max_tokens=1_000_000, **options), api_key="k")
    request = ModelRequest([{"role": "user", "content": "x" * 4_000_000}])

    assert client.largest_cost_usd(request) == usd


def test_a_call_with_fallbacks_may_cost_what_the_dearest_one_costs() -> None:
    dear, cheap = (
        MockClient(LLMOptions(max_tokens=9, pricing=LLMPricing(input=0.0, output=rate)))
        for rate in (2_000_000.0, 1_000_000.0)
    )
    request = ModelRequest([{"role": "user", "content": "hi"}])

    for clients in ([cheap, dear], [dear, cheap], [dear, MockClient(LLMOptions())]):
        assert FallbackClient(clients, max_attempts=3).largest_cost_usd(request) == 18
