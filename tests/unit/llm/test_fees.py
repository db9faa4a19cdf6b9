"""What a provider bills beside plain tokens: its own tools, its regions, audio in its cache, tuned models."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions, LLMPricing
from openagents_worker.llm.base import LLMUsage, ModelRequest
from openagents_worker.llm.openai_chat import OpenAICompatibleClient
from openagents_worker.llm.pricing import price
from openagents_worker.llm.usage import usage_from_wire
from tests.unit.llm.raw_server import JSON, STREAM, Sent, answering, delta, sse, whole
from tests.unit.llm.wire import ANTHROPIC, CHAT, HI, RESPONSES, Format, Heard, ask, client_of

TOKENS = {"input_tokens": 1_000, "output_tokens": 100}


def cost(model: str, metadata: dict[str, Any], pricing: LLMPricing | None = None, **more: Any) -> Any:
    """The cost of 1,000 tokens and 100 tokens."""
    return price(model, LLMUsage(1_000, 100, 1_100, metadata), pricing, **more).metadata["cost_usd"]


# --- tools of the provider -------------------------------------------------------------------------------

SEARCH = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search"}}
OPENED = {**SEARCH, "action": {"type": "open_page", "url": "https://example.com"}}
FOUND = {**SEARCH, "action": {"type": "find_in_page", "pattern": "tea"}}
OLD = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
FILES = {"type": "file_search_call", "id": "fs_1", "status": "completed", "queries": ["tea"]}
IMAGE = {"type": "image_generation_call", "id": "ig_1", "status": "completed", "result": "AAAA"}
CODE = {"type": "code_interpreter_call", "id": "ci_1", "status": "completed", "container_id": "cntr_1"}
SAID = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Tea."}]}


def response(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    fields = {"object": "response", "id": "resp_1", "status": "completed", "model": "gpt-5", **more}
    return {**fields, "output": [*items, SAID], "usage": {**TOKENS, "total_tokens": 1_100}}


def message(searches: int) -> dict[str, Any]:
    usage = {**TOKENS, "server_tool_use": {"web_search_requests": searches, "web_fetch_requests": 3}}
    fields = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5"}
    return {
        **fields,
        "content": [{"type": "text", "text": "Tea."}],
        "stop_reason": "end_turn",
        "usage": usage,
    }


def completion(model: str, *citations: str) -> dict[str, Any]:
    annotations = [{"type": kind, kind: {"url": "https://example.com"}} for kind in citations]
    usage = {"prompt_tokens": 1_000, "completion_tokens": 100, "total_tokens": 1_100}
    return {**whole(content="Tea.", annotations=annotations, usage=usage), "model": model}


@pytest.mark.parametrize(
    ("wire", "body", "counted"),
    [
        (ANTHROPIC, message(2), {"web_search_calls": 2}),
        (ANTHROPIC, message(0), {}),
        (RESPONSES, response(SEARCH, OPENED, FOUND, SEARCH, OLD), {"web_search_calls": 3}),
        (
            RESPONSES,
            response(SEARCH, SEARCH, tool_usage={"web_search": {"num_requests": 1}}),
            {"web_search_calls": 1},
        ),
        (
            RESPONSES,
            response(FILES, FILES, IMAGE, CODE, CODE, {**CODE, "container_id": "cntr_2"}),
            {"file_search_calls": 2, "image_generation_calls": 1, "code_interpreter_containers": 2},
        ),
        (RESPONSES, response(), {}),
        (CHAT, completion("gpt-4o-search-preview", "url_citation", "url_citation"), {"web_search_calls": 1}),
        (CHAT, completion("gpt-4o-mini-search-preview-2025-03-11"), {"web_search_calls": 1}),
        (CHAT, completion("gpt-4o", "file_citation"), {}),
    ],
)
async def test_the_tools_that_a_provider_has_executed_are_counted(
    wire: Format, body: dict[str, Any], counted: dict[str, int]
) -> None:
    async with answering(lambda _: Sent((json.dumps(body).encode(),), JSON)) as url:
        reply = await ask(client_of(wire, url, model=body["model"]))

    assert reply.usage is not None
    found = {name: reply.usage.metadata[name] for name in counted}
    assert found == counted
    assert [name for name in reply.usage.metadata if name.endswith(("_calls", "_containers"))] == list(
        counted
    )


async def test_the_searches_of_a_stream_are_counted() -> None:
    """Anthropic counts them with the stop reason, a chat completion has its citations in a chunk."""
    start = {**message(0), "content": [], "stop_reason": None}
    stop = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": message(2)["usage"]}
    chunk = delta(content="Tea.", annotations=[{"type": "url_citation", "url_citation": {}}])
    usage = {"prompt_tokens": 1_000, "completion_tokens": 100}
    end = {**delta("stop"), "usage": usage}
    sent = {
        ANTHROPIC.provider: sse({"type": "message_start", "message": start}, stop),
        CHAT.provider: sse(chunk, end, "[DONE]"),
    }
    found = {}
    for wire in (ANTHROPIC, CHAT):
        async with answering(lambda _, body=sent[wire.provider]: Sent((body,), STREAM)) as url:
            reply = await ask(client_of(wire, url), on_delta=Heard())
        assert reply.usage is not None
        found[wire.provider] = reply.usage.metadata["web_search_calls"]

    assert found == {ANTHROPIC.provider: 2, CHAT.provider: 1}


def test_a_web_search_costs_what_the_table_says() -> None:
    usage = price("claude-sonnet-4-5", LLMUsage(1_000, 100, 1_100, {"web_search_calls": 3}))

    assert usage.metadata["cost_breakdown"] == {
        "input": pytest.approx(0.003),
        "output": pytest.approx(0.0015),
        "web_search": pytest.approx(0.03),
    }
    assert usage.metadata["cost_usd"] == pytest.approx(0.0345)


@pytest.mark.parametrize(
    ("model", "counted", "pricing", "missing", "usd"),
    [
        ("gpt-4o", {"web_search_calls": 2}, {"web_search": 0.02}, "web_search", 0.04),
        ("gpt-5", {"file_search_calls": 2}, {"file_search": 0.0025}, "file_search", 0.005),
        ("gpt-5", {"image_generation_calls": 1}, {"image_generation": 0.04}, "image_generation", 0.04),
        ("gpt-5", {"code_interpreter_containers": 1}, {"code_interpreter": 0.03}, "code_interpreter", 0.03),
    ],
)
def test_a_tool_without_a_known_price_makes_the_cost_unknown(
    model: str, counted: dict[str, int], pricing: dict[str, float], missing: str, usd: float
) -> None:
    """It is not free. `llm.pricing` has the rate of the account."""
    plain = cost(model, {})
    unknown = price(model, LLMUsage(1_000, 100, 1_100, counted))

    assert unknown.metadata["cost_usd"] is None
    assert unknown.metadata["unpriced_parts"] == [missing]
    assert cost(model, counted, LLMPricing(**pricing)) == pytest.approx(plain + usd)
    assert cost(model, counted, LLMPricing(**{missing: 0.0})) == pytest.approx(plain)


@pytest.mark.parametrize("calls", [-3, "two", float("nan"), {}, None])
def test_a_number_of_calls_that_is_no_number_counts_as_none(calls: Any) -> None:
    """A gateway may write anything; nobody gets money back."""
    assert cost("claude-sonnet-4-5", {"web_search_calls": calls}) == cost("claude-sonnet-4-5", {})


# --- regions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "region", "factor"),
    [
        ("gpt-6-astra", None, 1.0),
        ("gpt-6-astra", "eu", 1.1),
        ("gpt-6-astra", "us", 1.1),
        ("gpt-6-astra", "gov", 1.1),
        ("gpt-6-astra", "jp", None),
        ("gpt-4o", "eu", 1.0),
        ("gpt-4o", "jp", 1.0),
        ("gpt-4o", "gov", 1.1),
        ("claude-opus-5-5", "us", 1.1),
        ("claude-opus-5-5", "eu", None),
        ("claude-opus-5-5", "global", 1.0),
        ("claude-sonnet-4-5", "us", 1.0),
        ("deepseek-chat", "eu", 1.0),
    ],
)
def test_tokens_cost_more_in_a_region_with_prices_of_its_own(
    model: str, region: str | None, factor: float | None
) -> None:
    """A region whose price is not listed has no known cost, if the model costs more in others."""
    found = cost(model, {"inference_geo": region} if region else {})

    assert found == (None if factor is None else pytest.approx(cost(model, {}) * factor))


def test_a_web_search_costs_the_same_in_a_region() -> None:
    with_search, without = ({"inference_geo": "eu", "web_search_calls": count} for count in (1, 0))

    assert cost("gpt-6-astra", with_search) - cost("gpt-6-astra", without) == pytest.approx(0.01)


async def test_the_address_of_openai_says_the_region() -> None:
    """Here its proxy is the server: it gets the whole URL."""
    body = completion("gpt-6-astra")
    paths: list[str] = []
    async with answering(lambda _: Sent((json.dumps(body).encode(),), JSON), paths) as url:
        proxy = url.removesuffix("/v1")
        reply = await ask(client_of(CHAT, "http://eu.api.openai.com/v1", proxy=proxy, model="gpt-6-astra"))

    assert paths == ["http://eu.api.openai.com/v1/chat/completions"]
    assert reply.usage is not None
    assert reply.usage.metadata["inference_geo"] == "eu"
    assert reply.usage.metadata["cost_usd"] == pytest.approx(cost("gpt-6-astra", {}) * 1.1)


@pytest.mark.parametrize(
    ("base", "factor"),
    [
        ("https://eu.api.openai.com/v1", 1.1),
        ("https://api.openai.com/v1", 1.0),
        ("https://eu.api.openai.com.example.com/v1", 1.0),
        ("http://127.0.0.1:1/v1", 1.0),
    ],
)
def test_what_is_reserved_for_a_call_is_the_price_of_the_region(base: str, factor: float) -> None:
    options = LLMOptions(provider="openai_compatible", model="gpt-6-astra", api_base=base, max_tokens=100)
    request = ModelRequest(HI)
    plain = OpenAICompatibleClient(options.model_copy(update={"api_base": "http://x"}), api_key="k")

    found = OpenAICompatibleClient(options, api_key="k").largest_cost_usd(request)

    most = plain.largest_cost_usd(request)
    assert most is not None
    assert found == pytest.approx(most * factor)


@pytest.mark.parametrize(
    ("options", "rate"),
    [({}, 12.5), ({"prompt_cache_options": {"ttl": "12h"}}, 25.0), ({"model": "gpt-4o"}, 2.5)],
)
def test_what_is_reserved_for_a_call_includes_that_openai_may_keep_it_in_its_cache(
    options: dict[str, Any], rate: float
) -> None:
    """Newer models write the whole request to it unasked, at a higher price."""
    place = {"provider": "openai_compatible", "api_base": "http://x", "max_tokens": 1}
    client = OpenAICompatibleClient(LLMOptions(**{"model": "gpt-6-astra", **place, **options}), api_key="k")
    request = ModelRequest([{"role": "user", "content": "x" * 400_000}])

    found = client.largest_cost_usd(request)

    assert found == pytest.approx(100_000 * rate / 1e6, rel=0.001)


# --- tuned models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "served", "usd"),
    [
        ("ft:gpt-4o-mini-2024-07-18:acme::a1", None, (1_000 * 0.3 + 100 * 1.2) / 1e6),
        ("ft:gpt-4o-mini-2024-07-18", None, (1_000 * 0.3 + 100 * 1.2) / 1e6),
        ("ft:gpt-3.5-turbo:acme:tea:a1:ckpt-step-90", None, (1_000 * 3 + 100 * 6) / 1e6),
        ("FT:gpt-4.1-2025-04-14:acme::a1-2025-01-01", None, (1_000 * 3 + 100 * 12) / 1e6),
        ("our-deployment", "ft:gpt-4.1-2025-04-14:acme::a1", (1_000 * 3 + 100 * 12) / 1e6),
        ("ft:gpt-4o-mini:acme::a1", None, None),
        ("ft:gpt-4o-mini:acme::a1", "gpt-4o-mini-2024-07-18", None),
        ("ft:open-mistral-7b:acme:20240502:a1", None, None),
        ("ft:", None, None),
    ],
)
def test_a_tuned_model_never_costs_what_its_base_costs(
    model: str, served: str | None, usd: float | None
) -> None:
    """It has the price of all models that are tuned from this base, or none that is known."""
    assert cost(model, {}, served=served) == (None if usd is None else pytest.approx(usd))


# --- audio in the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "details",
    [
        {"prompt_tokens_details": {"cached_tokens_details": {"audio_tokens": 30, "text_tokens": 10}}},
        {"input_tokens_details": {"cached_tokens_details": {"audio_tokens": 30}}},
        {"prompt_tokens_details": {"cached_audio_tokens": 30}},
    ],
)
def test_audio_from_the_cache_is_read_in_every_spelling(details: dict[str, Any]) -> None:
    usage = usage_from_wire({"prompt_tokens": 100, **details})

    assert usage is not None
    assert usage.metadata["cached_audio_tokens"] == 30


AUDIO = {"cached_tokens": 400, "audio_tokens": 300, "cached_audio_tokens": 200}


@pytest.mark.parametrize(
    ("model", "pricing", "usd"),
    [
        # 200 audio and 200 other tokens from the cache, 100 new audio, 500 new other
        ("gemini-2.5-flash", {}, (200 * 0.1 + 200 * 0.03 + 100 * 1.0 + 500 * 0.3 + 100 * 2.5) / 1e6),
        # the same price as for text
        ("gpt-4.1", {}, (400 * 0.5 + 600 * 2 + 100 * 8) / 1e6),
        # a price of its own for audio, and none for audio from the cache
        ("gpt-audio", {}, None),
        ("gpt-audio", {"cached_audio": 1.0, "cached_read": 0.5}, None),
    ],
)
def test_audio_from_the_cache_is_counted_once(
    model: str, pricing: dict[str, float], usd: float | None
) -> None:
    """It is part of the audio and of what was read from the cache."""
    found = cost(model, AUDIO, LLMPricing(**pricing) if pricing else None)

    if pricing:
        usd = (200 * 1.0 + 200 * 0.5 + 100 * 32 + 500 * 2.5 + 100 * 10) / 1e6
    assert found == (None if usd is None else pytest.approx(usd))
