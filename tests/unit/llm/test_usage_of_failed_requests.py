"""What a request has used whose reply is not an answer: the provider bills it, so it is part of the call."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMConnectionError
from openagents_worker.llm.base import LLMUsage
from openagents_worker.llm.call_usage import joined_usage
from openagents_worker.llm.openai_responses_items import response_from_wire
from openagents_worker.llm.providers import make_client
from tests.unit.llm.raw_server import JSON, STREAM, Sent, answering, delta, sse, whole
from tests.unit.llm.wire import CHAT, HI, Heard, client_of

MALFORMED = "function_call_filter: MALFORMED_FUNCTION_CALL"
PRICING = {"input": 1.0, "output": 10.0}


def counted(asked: int, answered: int) -> dict[str, int]:
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def plain(body: dict[str, Any]) -> Sent:
    return Sent((json.dumps(body).encode(),), JSON)


def streamed(body: dict[str, Any]) -> Sent:
    reason = body["choices"][0]["finish_reason"]
    last = {"id": "c", "model": "m", "choices": [], "usage": body["usage"]}
    return Sent((sse(delta(content="he"), delta(reason), last, "[DONE]"),), STREAM)


class Server:
    """The first replies end with an error; each has used 100 and 10 tokens. The answer has used 7 and 5."""

    def __init__(self, failures: int, shape: Callable[[dict[str, Any]], Sent] = plain) -> None:
        self.failures, self.shape = failures, shape
        self.models: list[str] = []

    def __call__(self, body: dict[str, Any]) -> Sent:
        self.models.append(body["model"])
        if len(self.models) <= self.failures:
            return self.shape(whole(MALFORMED, content="he", usage=counted(100, 10)))
        return self.shape(whole(content="hello", usage=counted(7, 5)))


async def test_the_tries_before_an_answer_count() -> None:
    """Gemini writes a tool call that cannot be read; vLLM gives a reply up. The request is repeated."""
    async with answering(Server(2)) as url:
        client = client_of(CHAT, url, pricing=PRICING)
        usage = (await client.generate(messages=list(HI))).usage
        await client.aclose()

    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (207, 25, 232)
    assert usage.metadata["cost_usd"] == pytest.approx((207 * 1 + 25 * 10) / 1e6)
    assert usage.metadata["cost_breakdown"] == pytest.approx({"input": 207 / 1e6, "output": 250 / 1e6})
    assert usage.metadata["retries"] == 2


@pytest.mark.parametrize("shape", [plain, streamed])
async def test_a_call_that_fails_has_the_usage_of_all_its_tries(
    shape: Callable[[dict[str, Any]], Sent],
) -> None:
    async with answering(Server(9, shape)) as url:
        client = client_of(CHAT, url, pricing=PRICING, retry={"max_attempts": 3}, stream=shape is streamed)
        listener = {"on_delta": Heard()} if shape is streamed else {}
        with pytest.raises(LLMConnectionError) as caught:
            await client.generate(messages=list(HI), **listener)
        await client.aclose()

    tries = 1 if shape is streamed else 3  # a piece was delivered, so the call is not repeated here
    usage = caught.value.usage
    assert (usage.input_tokens, usage.output_tokens) == (100 * tries, 10 * tries)
    assert usage.metadata["cost_usd"] == pytest.approx(tries * (100 * 1 + 10 * 10) / 1e6)


async def test_a_fallback_adds_what_the_model_before_it_has_used() -> None:
    server = Server(1)
    async with answering(server) as url:
        fallback = {"model": "small", "pricing": {"input": 2.0, "output": 2.0}}
        values = {"pricing": PRICING, "retry": {"max_attempts": 1}, "fallbacks": [fallback]}
        options = LLMOptions(provider="openai_compatible", model="big", api_base=url, **values)
        client = make_client(options, env={})
        usage = (await client.generate(messages=list(HI))).usage
        await client.aclose()

    assert server.models == ["big", "small"]
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (107, 15)
    assert usage.metadata["cost_usd"] == pytest.approx((100 * 1 + 10 * 10 + 7 * 2 + 5 * 2) / 1e6)
    assert usage.metadata["fallback"] == "openai_compatible/small"


def test_a_response_that_failed_keeps_its_usage() -> None:
    failed = {
        "status": "failed",
        "error": {"code": "server_error", "message": "it broke"},
        "usage": {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110},
        "output": [],
    }
    with pytest.raises(LLMConnectionError) as caught:
        response_from_wire(failed, provider="openai_responses")

    assert (caught.value.usage.input_tokens, caught.value.usage.output_tokens) == (100, 10)


def test_a_cost_that_is_not_known_makes_the_whole_unknown() -> None:
    known = LLMUsage(1, 1, 2, {"cost_usd": 0.5, "cost_breakdown": {"input": 0.5}, "cached_tokens": 1})
    unknown = LLMUsage(2, 2, 4, {"cost_usd": None, "cached_tokens": 2, "ttft_ms": 3.0})

    joined = joined_usage([known, unknown])

    assert joined == LLMUsage(
        3,
        3,
        6,
        {"cost_usd": None, "cost_breakdown": {"input": 0.5}, "cached_tokens": 3, "ttft_ms": 3.0},
    )
    assert joined_usage([]) is None
