"""Which values a fallback sends: its own, those of its agent, or those of the call.

The patterns pass the agent's `temperature` and `max_tokens` with each request.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions, LLMPricing
from openagents_worker.llm.base import ModelClient, ModelRequest
from openagents_worker.llm.providers import make_client
from tests.unit.llm.raw_server import JSON, Sent, answering, whole
from tests.unit.llm.wire import HI

AGENT: dict[str, Any] = {"provider": "openai_compatible", "model": "big", "max_tokens": 32_000}
HOT = {**AGENT, "temperature": 0.9}
OTHER = {"provider": "anthropic", "model": "small"}
NAMES = ("temperature", "max_tokens")


def as_patterns_ask(options: LLMOptions, **explicit: Any) -> dict[str, Any]:
    """The request of a pattern: the agent's values, unless the call has its own."""
    own = {"model": options.model, "temperature": options.temperature, "max_tokens": options.max_tokens}
    return {"messages": list(HI), **own, **explicit}


async def sent_to_fallback(agent: dict[str, Any], entry: dict[str, Any], **explicit: Any) -> dict[str, Any]:
    """What the fallback is sent, after the agent's own model was refused."""
    bodies: list[Any] = []

    def reply(body: Any) -> Sent:
        bodies.append(body)
        if body["model"] == "big":
            return Sent((b'{"error": {"message": "no such model"}}',), JSON, "404 Not Found")
        if entry.get("provider") == "anthropic":
            message = {"type": "message", "content": [{"type": "text", "text": "hi"}], "model": "small"}
            return Sent((json.dumps(message).encode(),), JSON)
        return Sent((json.dumps(whole(content="hi")).encode(),), JSON)

    async with answering(reply) as url:
        entry = {**entry, **({"api_base": url} if "provider" in entry else {})}
        options = LLMOptions(**agent, api_base=url, fallbacks=[entry])
        client = make_client(options, env={})
        try:
            answer = await client.generate(**as_patterns_ask(options, **explicit))
        finally:
            await client.aclose()
    assert answer.output_text == "hi"
    first, second = bodies
    own = {name: explicit.get(name, agent.get(name)) for name in NAMES}
    assert {name: first.get(name) for name in NAMES} == own
    return {name: second[name] for name in NAMES if name in second}


@pytest.mark.parametrize(
    ("agent", "entry", "sent"),
    [
        (HOT, {"temperature": 0.1, "max_tokens": 4_096}, {"temperature": 0.1, "max_tokens": 4_096}),
        (HOT, {"max_tokens": 4_096}, {"temperature": 0.9, "max_tokens": 4_096}),
        (HOT, {"temperature": None}, {"max_tokens": 32_000}),
        (HOT, {"temperature": None, "max_tokens": None}, {}),
        (HOT, {}, {"temperature": 0.9, "max_tokens": 32_000}),
        (AGENT, {"temperature": 0.1}, {"temperature": 0.1, "max_tokens": 32_000}),
        (HOT, {**OTHER, "temperature": None, "max_tokens": 4_096}, {"max_tokens": 4_096}),
        (HOT, {**OTHER, "temperature": 0.1, "max_tokens": None}, {"temperature": 0.1, "max_tokens": 8_192}),
        (HOT, OTHER, {"temperature": 0.9, "max_tokens": 32_000}),
    ],
)
async def test_a_fallback_sends_the_values_that_its_entry_names(
    agent: dict[str, Any], entry: dict[str, Any], sent: dict[str, Any]
) -> None:
    """`null` takes the agent's value away. What the entry does not name is the agent's."""
    assert await sent_to_fallback(agent, {"model": "small", **entry}) == sent


async def test_a_fallback_sends_what_the_call_itself_asks_for() -> None:
    """`call_llm(max_tokens=…)` goes before the options of the agent, so it goes before those of an entry."""
    entry = {"model": "small", "temperature": 0.1, "max_tokens": 4_096}

    sent = await sent_to_fallback(HOT, entry, max_tokens=50, temperature=0.0)

    assert sent == {"temperature": 0.0, "max_tokens": 50}


def test_the_largest_cost_has_the_max_tokens_of_each_model() -> None:
    """A dear model with few tokens may cost less than a cheap one with many."""
    place = {**AGENT, "api_base": "http://127.0.0.1:1/v1", "max_tokens": 1_000_000}
    pricing = {"input": 0.0, "output": 20.0}
    entry = {"model": "small", "max_tokens": 100_000, "pricing": pricing}
    options = LLMOptions(**place, pricing=LLMPricing(input=0.0, output=1.0), fallbacks=[entry])
    client = make_client(options, env={})
    assert isinstance(client, ModelClient)

    assert client.largest_cost_usd(ModelRequest(**as_patterns_ask(options))) == 2
    assert client.largest_cost_usd(ModelRequest(**as_patterns_ask(options, max_tokens=500_000))) == 10
