"""The cost of a model call."""

from __future__ import annotations

import pytest

from openagents_worker.agents import LLMOptions, LLMPricing
from openagents_worker.llm.base import LLMUsage
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
