"""`temperature`, `top_p` and `top_k` for models that refuse them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMResponseError
from openagents_worker.llm.anthropic_messages import AnthropicExtras, AnthropicMessages
from openagents_worker.llm.base import ModelRequest
from openagents_worker.testing.model_server.wire_format import InvalidRequest
from tests.unit.llm.raw_server import JSON, Sent, answering, whole
from tests.unit.llm.wire import ANTHROPIC, CHAT, HI, Format, client_of

SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 3}
ANSWERS: dict[str, Any] = {
    "anthropic": {"type": "message", "content": [{"type": "text", "text": "hi"}]},
    "openai_compatible": whole(content="hi"),
}


@pytest.mark.parametrize(
    ("model", "is_refused"),
    [
        ("claude-opus-4-7", True),
        ("claude-opus-4-8-20260601", True),
        ("claude-sonnet-5", True),
        ("claude-opus-5-5", True),
        ("claude-fable-5", True),
        ("anthropic.claude-opus-4-7-v1:0", True),
        ("anthropic/claude-opus-4.8", True),
        ("claude-opus-4-6", False),
        ("claude-opus-4-20250514", False),
        ("claude-sonnet-4-5", False),
        ("claude-3-5-haiku-latest", False),
        ("kimi-k2", False),
    ],
)
def test_claude_models_that_refuse_sampling_parameters_get_none(model: str, is_refused: bool) -> None:
    """An agent may have them for its other models, and the patterns pass the `temperature` of the agent."""
    extras = AnthropicExtras(top_p=0.9, top_k=3)
    body = AnthropicMessages(LLMOptions(temperature=0.5), extras).body(
        ModelRequest(HI, temperature=0.2), model
    )

    assert {name for name in SAMPLING if name in body} == (set() if is_refused else set(SAMPLING))
    ANTHROPIC.check(body)


@pytest.mark.parametrize("name", sorted(SAMPLING))
def test_the_model_server_refuses_them_as_the_provider_does(name: str) -> None:
    body = {**ANTHROPIC.body(HI), "model": "claude-opus-4-7", name: SAMPLING[name]}

    with pytest.raises(InvalidRequest, match=f"`{name}` is deprecated for this model"):
        ANTHROPIC.check(body)


class Choosy:
    """A server that refuses some parameters, one after the other."""

    def __init__(self, wire: Format, errors: dict[str, str]) -> None:
        self.wire = wire
        self.errors = errors
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, body: dict[str, Any]) -> Sent:
        self.bodies.append(body)
        refused = next((error for name, error in self.errors.items() if name in body), None)
        if refused is None:
            return Sent((json.dumps(ANSWERS[self.wire.provider]).encode(),), JSON)
        error = {"type": "error", "error": {"type": "invalid_request_error", "message": refused}}
        return Sent((json.dumps(error).encode(),), JSON, "400 Bad Request")

    def sent(self) -> list[list[str]]:
        return [[name for name in SAMPLING if name in body] for body in self.bodies]


@pytest.mark.parametrize(
    ("wire", "errors", "sent"),
    [
        (
            ANTHROPIC,
            {name: f"`{name}` is deprecated for this model." for name in SAMPLING},
            [["temperature", "top_p", "top_k"], ["top_p", "top_k"], ["top_k"], [], []],
        ),
        (
            ANTHROPIC,
            {"top_p": "`temperature` and `top_p` cannot both be specified for this model."},
            [["temperature", "top_p", "top_k"], ["temperature", "top_k"], ["temperature", "top_k"]],
        ),
        (
            CHAT,
            {
                "temperature": "Unsupported value: 'temperature' does not support 0.5 with this model.",
                "top_p": "Unsupported parameter: 'top_p' is not supported with this model.",
            },
            [["temperature", "top_p"], ["top_p"], [], []],
        ),
    ],
)
async def test_a_model_that_refuses_a_parameter_is_asked_again_without_it(
    wire: Format, errors: dict[str, str], sent: list[list[str]]
) -> None:
    """The next request of the client goes without it at once."""
    server = Choosy(wire, errors)
    options = {name: value for name, value in SAMPLING.items() if wire is ANTHROPIC or name != "top_k"}
    async with answering(server) as url:
        client = client_of(wire, url, model="its-own-name", **options)
        replies = [await client.generate(messages=list(HI)) for _ in range(2)]
        await client.aclose()

    assert [reply.output_text for reply in replies] == ["hi", "hi"]
    assert server.sent() == sent


async def test_a_value_that_is_wrong_for_every_model_is_an_error() -> None:
    server = Choosy(CHAT, {"temperature": "Invalid 'temperature': decimal above maximum value."})
    async with answering(server) as url:
        client = client_of(CHAT, url, temperature=1.9)
        with pytest.raises(LLMResponseError, match="above maximum"):
            await client.generate(messages=list(HI))
        await client.aclose()

    assert len(server.bodies) == 1


async def test_another_model_of_the_same_client_is_sent_them() -> None:
    server = Choosy(CHAT, {})
    async with answering(server) as url:
        client = client_of(CHAT, url, model="one", temperature=0.5)
        server.errors = {"temperature": "`temperature` is deprecated for this model."}
        await client.generate(messages=list(HI))
        server.errors = {}
        await client.generate(messages=list(HI), model="two")
        await client.aclose()

    assert server.sent() == [["temperature"], [], ["temperature"]]
