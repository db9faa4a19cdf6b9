"""Token counts and costs of real replies, worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from openagents_worker.agents import LLMPricing
from openagents_worker.llm.base import LLMUsage
from openagents_worker.llm.pricing import price, price_table
from openagents_worker.llm.usage import stated_cost, usage_from_wire

# What the provider sends; the counts: input, output, read from the cache, written to it, reasoning.
COUNTS: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, int]]] = {
    "OpenAI chat": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 100,
            "total_tokens": 1100,
            "prompt_tokens_details": {"cached_tokens": 800},
            "completion_tokens_details": {"reasoning_tokens": 60},
        },
        (1000, 100, 800, 0, 60),
    ),
    "OpenAI responses": (
        {
            "input_tokens": 1000,
            "output_tokens": 100,
            "total_tokens": 1100,
            "input_tokens_details": {"cached_tokens": 800},
            "output_tokens_details": {"reasoning_tokens": 60},
        },
        (1000, 100, 800, 0, 60),
    ),
    "Anthropic: the cache apart": (
        {
            "input_tokens": 100,
            "output_tokens": 50,
            "cache_read_input_tokens": 800,
            "cache_creation_input_tokens": 200,
        },
        (1100, 50, 800, 200, 0),
    ),
    "Anthropic gateway: the cache in the total only": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 50,
            "total_tokens": 1850,
            "cache_read_input_tokens": 800,
        },
        (1800, 50, 800, 0, 0),
    ),
    "LiteLLM: the cache included": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 50,
            "total_tokens": 1050,
            "cache_read_input_tokens": 800,
            "cache_creation_input_tokens": 100,
        },
        (1000, 50, 800, 100, 0),
    ),
    "DeepSeek": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 50,
            "total_tokens": 1050,
            "prompt_cache_hit_tokens": 800,
            "prompt_cache_miss_tokens": 200,
        },
        (1000, 50, 800, 0, 0),
    ),
    "Kimi": (
        {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1050, "cached_tokens": 800},
        (1000, 50, 800, 0, 0),
    ),
    "Gemini: reasoning in the total only": (
        {"prompt_tokens": 1000, "completion_tokens": 50, "total_tokens": 1650},
        (1000, 650, 0, 0, 0),
    ),
    "xAI: reasoning beside the output": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 50,
            "total_tokens": 1650,
            "completion_tokens_details": {"reasoning_tokens": 600},
        },
        (1000, 650, 0, 0, 600),
    ),
    "OpenRouter: written to the cache": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 50,
            "total_tokens": 1050,
            "prompt_tokens_details": {"cached_tokens": 300, "cache_write_tokens": 500},
        },
        (1000, 50, 300, 500, 0),
    ),
}


@pytest.mark.parametrize("provider", COUNTS)
def test_every_spelling_of_a_count_is_read(provider: str) -> None:
    """The input includes the cache, the output includes the reasoning, whoever counts."""
    wire, expected = COUNTS[provider]

    usage = usage_from_wire(wire)

    assert usage is not None
    names = ("cached_tokens", "cache_creation_input_tokens", "reasoning_tokens")
    details = tuple(usage.metadata.get(name, 0) for name in names)
    assert (usage.input_tokens, usage.output_tokens, *details) == expected


@pytest.mark.parametrize("wire", [None, {}, [], "7", {"prompt_tokens": 0, "completion_tokens": 0}])
def test_zeros_and_other_values_are_no_count(wire: Any) -> None:
    """The counts are then estimated."""
    assert usage_from_wire(wire) is None


# The model, the counts and what the call costs, in USD: computed by hand from the price lists.
COSTS: dict[str, tuple[str, LLMUsage, float]] = {
    "gpt-4o: 200 fresh, 800 cached, 100 output": (
        "gpt-4o-2024-08-06",
        LLMUsage(1000, 100, 1100, {"cached_tokens": 800}),
        (200 * 2.5 + 800 * 1.25 + 100 * 10) / 1e6,
    ),
    "claude-sonnet-4-5: 100 fresh, 800 read, 150 written for 5 minutes and 50 for an hour": (
        "claude-sonnet-4-5-20250929",
        LLMUsage(
            1100,
            50,
            1150,
            {
                "cached_tokens": 800,
                "cache_creation_input_tokens": 200,
                "cache_creation_1h_input_tokens": 50,
            },
        ),
        (100 * 3 + 800 * 0.3 + 150 * 3.75 + 50 * 6 + 50 * 15) / 1e6,
    ),
    "gemini-2.5-pro: a request of at most 200,000 tokens": (
        "gemini-2.5-pro",
        LLMUsage(200_000, 10),
        (200_000 * 1.25 + 10 * 10) / 1e6,
    ),
    "gemini-2.5-pro: a longer request": (
        "models/gemini-2.5-pro",
        LLMUsage(200_001, 10),
        (200_001 * 2.5 + 10 * 15) / 1e6,
    ),
    "gpt-5: the tier flex": (
        "gpt-5",
        LLMUsage(1000, 100, 1100, {"service_tier": "flex", "cached_tokens": 400}),
        (600 * 0.625 + 400 * 0.0625 + 100 * 5) / 1e6,
    ),
    "gpt-5: the default tier": (
        "gpt-5",
        LLMUsage(1000, 100, 1100, {"service_tier": "default"}),
        (1000 * 1.25 + 100 * 10) / 1e6,
    ),
    "gpt-5: reasoning costs what output costs": (
        "gpt-5",
        LLMUsage(1000, 100, 1100, {"reasoning_tokens": 90}),
        (1000 * 1.25 + 100 * 10) / 1e6,
    ),
    "deepseek-chat": (
        "deepseek-chat",
        LLMUsage(1000, 50, 1050, {"cached_tokens": 800}),
        (200 * 0.28 + 800 * 0.028 + 50 * 0.42) / 1e6,
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_cost_is_right_to_the_token(name: str) -> None:
    """As on the provider's bill."""
    model, usage, usd = COSTS[name]

    assert price(model, usage).metadata["cost_usd"] == pytest.approx(usd, abs=1e-12)


COSTS_OF_NO_USE = ("free", "0.0", "-1", "nan", "inf", "")
"""LiteLLM's proxy writes 0.0 for a streamed reply and for an unknown price."""


def test_a_cost_that_the_provider_states_goes_first() -> None:
    """In the reply (OpenRouter, xAI), or in a header of a gateway (LiteLLM)."""
    wire = {"prompt_tokens": 10, "completion_tokens": 5}
    by_reply, by_ticks = (
        usage_from_wire(wire | {"cost": 0.5}),
        usage_from_wire(wire | {"cost_in_usd_ticks": 5_000_000_000}),
    )

    for usage in (by_reply, by_ticks):
        assert usage is not None
        assert price("gpt-4o", usage, LLMPricing(input=9, output=9)).metadata["cost_usd"] == 0.5
    assert stated_cost({"x-litellm-response-cost": "0.25"}) == 0.25
    assert [stated_cost({"x-litellm-response-cost": cost}) for cost in COSTS_OF_NO_USE] == [None] * 6


def test_the_model_of_the_reply_is_priced_if_the_requested_name_is_unknown() -> None:
    """A gateway's alias, or a deployment on Azure."""
    usage = LLMUsage(1_000_000, 0)

    assert price("our-alias", usage, served="gpt-4o-2024-08-06").metadata["cost_usd"] == 2.5
    assert price("our-alias", usage, served="another").metadata["cost_usd"] is None


def test_rates_of_the_agent_for_single_parts() -> None:
    """Reasoning and images may have rates of their own."""
    usage = LLMUsage(100, 50, 150, {"reasoning_tokens": 40, "image_tokens": 60})
    pricing = LLMPricing(input=1, output=2, reasoning=3, image=4)

    assert price("x", usage, pricing).metadata["cost_breakdown"] == {
        "input": pytest.approx(40e-6),
        "image": pytest.approx(240e-6),
        "output": pytest.approx(20e-6),
        "reasoning": pytest.approx(120e-6),
    }


def test_every_entry_of_the_table_can_be_used() -> None:
    """Each has rates for input and output, and no rate is negative."""
    for model, entry in price_table().items():
        cost = price(model, LLMUsage(10, 10)).metadata["cost_usd"]
        assert cost is not None, model
        assert cost >= 0
        assert {"input", "output"} <= entry.keys()
