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
    "Qwen: written to the cache": (
        {
            "prompt_tokens": 1000,
            "completion_tokens": 50,
            "total_tokens": 1050,
            "prompt_tokens_details": {"cached_tokens": 300, "cache_creation_input_tokens": 500},
        },
        (1000, 50, 300, 500, 0),
    ),
    "Anthropic: two compactions, whose tokens the other counts leave out": (
        {
            "input_tokens": 23_000,
            "output_tokens": 1_000,
            "cache_read_input_tokens": 300_000,
            "iterations": [
                {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3_500},
                {"type": "compaction", "input_tokens": 1, "output_tokens": 2, "cache_read_input_tokens": 5},
                {"type": "message", "input_tokens": 23_000, "output_tokens": 1_000},
            ],
        },
        (503_006, 4_502, 300_005, 0, 0),
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
    "gpt-6-astra: 100 fresh, 150 written for half an hour and 50 for twelve hours": (
        "gpt-6-astra",
        LLMUsage(300, 50, 350, {"cache_creation_input_tokens": 200, "cache_creation_1h_input_tokens": 50}),
        (100 * 10 + 150 * 12.5 + 50 * 25 + 50 * 50) / 1e6,
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
    "gpt-5: the other name of the tier priority": (
        "gpt-5",
        LLMUsage(1000, 100, 1100, {"service_tier": "fast"}),
        (1000 * 2.5 + 100 * 20) / 1e6,
    ),
    "gpt-6-astra: the tier ultrafast": (
        "gpt-6-astra",
        LLMUsage(1000, 100, 1100, {"service_tier": "ultrafast"}),
        (1000 * 60 + 100 * 300) / 1e6,
    ),
    "claude-opus-5-5: fast mode in the US, 800 read from the cache": (
        "claude-opus-5-5",
        LLMUsage(1000, 100, 1100, {"service_tier": "fast", "inference_geo": "us", "cached_tokens": 800}),
        (200 * 8 + 800 * 0.4 + 100 * 40) * 1.1 / 1e6,
    ),
    "gpt-5: reasoning costs what output costs": (
        "gpt-5",
        LLMUsage(1000, 100, 1100, {"reasoning_tokens": 90}),
        (1000 * 1.25 + 100 * 10) / 1e6,
    ),
    "gpt-audio: 80 of 100 output tokens are spoken": (
        "gpt-audio",
        LLMUsage(1000, 100, 1100, {"output_audio_tokens": 80}),
        (1000 * 2.5 + 20 * 10 + 80 * 64) / 1e6,
    ),
    "gpt-4o: spoken output costs what output costs": (
        "gpt-4o",
        LLMUsage(1000, 100, 1100, {"output_audio_tokens": 180}),
        (1000 * 2.5 + 100 * 10) / 1e6,
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


@pytest.mark.parametrize("model", ["gpt-5.6-sol", "claude-opus-4-5"])
@pytest.mark.parametrize("tier", ["fast", "ultrafast"])
def test_a_fast_tier_without_a_listed_price_does_not_cost_what_the_standard_tier_costs(
    model: str, tier: str
) -> None:
    """It costs a multiple. OpenAI's `fast` is listed as `priority`."""
    usage = LLMUsage(1000, 100, 1100, {"service_tier": tier})
    is_listed = "priority" in price_table()[model] and tier == "fast"

    assert (price(model, usage).metadata["cost_usd"] is not None) is is_listed
    assert price(model, usage, LLMPricing(input=1, output=2)).metadata["cost_usd"] == pytest.approx(0.0012)


def test_what_decides_the_price_of_a_reply_is_read_from_its_usage() -> None:
    """Anthropic's fast mode, and where the model ran."""
    fast = usage_from_wire({"input_tokens": 10, "speed": "fast", "inference_geo": "us"}, cache_is_apart=True)
    plain = usage_from_wire(
        {"input_tokens": 10, "speed": "standard", "inference_geo": "not_available"}, cache_is_apart=True
    )

    assert fast is not None
    assert plain is not None
    assert dict(fast.metadata) == {"service_tier": "fast", "inference_geo": "us"}
    assert dict(plain.metadata) == {}


@pytest.mark.parametrize(
    "wire",
    [
        {"cache_creation": {"ephemeral_1h_input_tokens": 7}},
        {"prompt_tokens_details": {"cache_creation": {"ephemeral_1h_input_tokens": 7}}},
        {"prompt_tokens_details": {"cache_creation_token_details": {"ephemeral_1h_input_tokens": 7}}},
        {"input_tokens_details": {"cache_write_tokens_details": {"ttl_30m_tokens": 3, "ttl_12h_tokens": 7}}},
        {"iterations": [{"type": "compaction", "cache_creation": {"ephemeral_1h_input_tokens": 7}}]},
    ],
    ids=["Anthropic", "Qwen", "LiteLLM", "OpenAI", "a compaction of Anthropic"],
)
def test_what_was_written_to_the_long_cache_is_read_in_every_spelling(wire: dict[str, Any]) -> None:
    usage = usage_from_wire({"input_tokens": 10, "output_tokens": 1, **wire})

    assert usage is not None
    assert usage.metadata["cache_creation_1h_input_tokens"] == 7


COSTS_OF_NO_USE = ("free", "0.0", "-1", "nan", "inf", "")
"""LiteLLM's proxy writes 0.0 for a streamed reply and for an unknown price."""


def test_a_cost_that_the_provider_states_goes_first() -> None:
    """In the reply (OpenRouter, xAI, Perplexity, DeepInfra), or in a header of a gateway (LiteLLM)."""
    wire = {"prompt_tokens": 10, "completion_tokens": 5}
    by_reply, by_ticks = (
        usage_from_wire(wire | {"cost": 0.5}),
        usage_from_wire(wire | {"cost_in_usd_ticks": 5_000_000_000}),
    )

    for usage in (by_reply, by_ticks):
        assert usage is not None
        assert price("gpt-4o", usage, LLMPricing(input=9, output=9)).metadata["cost_usd"] == 0.5
    by_object = usage_from_wire(wire | {"cost": {"total_cost": 0.5, "request_cost": 0.4}})
    by_estimate = usage_from_wire(wire | {"estimated_cost": 0.5})
    for usage in (by_object, by_estimate):
        assert usage is not None
        assert price("gpt-4o", usage).metadata["cost_usd"] == 0.5
    assert stated_cost({"x-litellm-response-cost": "0.25"}) == 0.25
    assert [stated_cost({"x-litellm-response-cost": cost}) for cost in COSTS_OF_NO_USE] == [None] * 6


@pytest.mark.parametrize(
    ("stated", "usd"),
    [
        ({"cost": 0.02, "is_byok": False, "cost_details": {"upstream_inference_cost": 0.02}}, 0.02),
        ({"cost": 0.001, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.02}}, 0.021),
        ({"cost": 0, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.02}}, 0.02),
        ({"cost": 0, "is_byok": True, "cost_details": {"upstream_inference_cost": None}}, None),
        ({"cost": 0, "is_byok": True}, None),
    ],
)
def test_a_call_with_the_accounts_own_key_costs_what_its_vendor_bills_too(
    stated: dict[str, Any], usd: float | None
) -> None:
    """OpenRouter's `cost` is then only its fee, or 0: the call is not free."""
    usage = usage_from_wire({"prompt_tokens": 10, "completion_tokens": 5, **stated})

    assert usage is not None
    assert price("vendor/model", usage).metadata["cost_usd"] == usd


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
