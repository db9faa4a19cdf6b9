"""Clients without a real model: the scripted one and the mock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions, LLMPricing
from openagents_worker.errors import (
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    PluginConfigError,
    PluginLoadError,
)
from openagents_worker.llm.base import CallInfo, LLMClient, LLMResponse, current_call
from openagents_worker.llm.mock import MockClient
from openagents_worker.llm.openai_chat import OpenAICompatibleClient
from openagents_worker.llm.providers import PROVIDERS, make_client
from openagents_worker.llm.scripted import ScriptedClient

HI = [{"role": "user", "content": "hi"}]


def _scripted(*entries: Any, **options: Any) -> ScriptedClient:
    return ScriptedClient(LLMOptions(provider="scripted", script=list(entries), **options))


async def _call(client: LLMClient, ordinal: int, failed_tries: int = 0) -> LLMResponse:
    info = CallInfo("r", f"main.{ordinal}", f"r:{ordinal}", ordinal, failed_tries)
    token = current_call.set(info)
    try:
        return await client.generate(messages=list(HI))
    finally:
        current_call.reset(token)


# --- scripted --------------------------------------------------------------------------------------------


async def test_the_nth_call_gets_the_nth_reply_on_every_worker() -> None:
    """The number of the call in its run selects the reply, not the calls of this client."""
    entries = ({"text": "one"}, {"text": "two"})

    texts = [(await _call(_scripted(*entries), n)).output_text for n in (1, 0, 1)]

    assert texts == ["two", "one", "two"]


async def test_errors_meet_the_first_tries_of_the_call_whose_reply_follows() -> None:
    """An error entry is not a reply: after `times` failed tries, the call gets its reply."""
    client = _scripted(
        {"text": "first"},
        {"error": "rate_limit", "retry_after_ms": 70, "times": 2},
        {"error": "connection"},
        {"text": "second"},
    )

    async def outcome(tries: int) -> object:
        try:
            return (await _call(client, 1, tries)).output_text
        except LLMError as error:
            return type(error), getattr(error, "retry_after_ms", None)

    assert [await outcome(tries) for tries in range(5)] == [
        (LLMRateLimitError, 70),
        (LLMRateLimitError, 70),
        (LLMConnectionError, None),
        "second",
        "second",
    ]
    assert (await _call(client, 0)).output_text == "first"


async def test_a_refused_request_is_a_response_error() -> None:
    """`{"error": "response"}` is not retryable."""
    with pytest.raises(LLMResponseError):
        await _call(_scripted({"error": "response"}, {"text": "x"}), 0)


async def test_a_script_that_has_ended_raises_an_error() -> None:
    """One call too many is an error that states the number of replies."""
    with pytest.raises(LLMResponseError, match="the script has ended after 1 replies"):
        await _call(_scripted({"text": "only"}), 1)


async def test_outside_of_a_run_the_client_counts_its_own_calls() -> None:
    """Without a run, the replies are returned in order."""
    client = _scripted({"text": "one"}, {"error": "connection"}, {"text": "two"})

    first = await client.generate(messages=list(HI))
    with pytest.raises(LLMConnectionError):
        await client.generate(messages=list(HI))
    second = await client.generate(messages=list(HI))

    assert [first.output_text, second.output_text] == ["one", "two"]


async def test_tool_calls_have_ids_that_do_not_change() -> None:
    """The id is made of the call's position, unless the script sets one. The arguments are the script's."""
    calls = [{"name": "add", "arguments": {"x": 1}}, {"name": "add", "arguments": {}, "id": "mine"}]

    reply = await _call(_scripted({"text": "on it", "tool_calls": calls}), 0)

    assert reply.output_text == "on it"
    assert [(c.id, c.name, c.arguments) for c in reply.tool_calls] == [
        ("call_0_0", "add", {"x": 1}),
        ("mine", "add", {}),
    ]
    assert reply.stop_reason == "tool_calls"


async def test_a_script_can_say_what_a_model_wrote_wrong() -> None:
    """Arguments given as text are sent unchanged, even if they are not valid JSON."""
    reply = await _call(_scripted({"tool_calls": [{"name": "add", "arguments": "{x"}]}), 0)

    assert reply.tool_calls[0].parse_error


async def test_a_script_says_its_usage_or_it_is_estimated() -> None:
    """Tokens of the entry, otherwise one per four characters; both have a price."""
    client = _scripted(
        {"text": "a", "usage": {"input_tokens": 1000, "output_tokens": 10}},
        {"text": "b" * 40},
        pricing=LLMPricing(input=1000, output=0),
    )

    said, guessed = (await _call(client, 0)).usage, (await _call(client, 1)).usage

    assert said is not None
    assert guessed is not None
    assert (said.input_tokens, said.output_tokens, said.metadata["cost_usd"]) == (1000, 10, 1.0)
    assert (guessed.input_tokens, guessed.output_tokens) == (1, 10)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"text": "ok"}, {"txt": "x"}], r"script\[1\].*neither"),
        ([{"error": "rate_limits"}], r"script\[0\].*unknown error 'rate_limits'"),
        ([{"text": 3}], r"script\[0\].*text"),
        ([{"text": "x", "latncy_ms": 3}], r"script\[0\].*latncy_ms"),
        ([{"tool_calls": [{"arguments": {}}]}], r"script\[0\].*tool_calls\.0\.name"),
        ([{"error": "response", "times": 0}], r"script\[0\].*times"),
        (["hello"], r"script\[0\].*object"),
    ],
)
def test_a_script_is_checked_before_anything_runs(entries: list[Any], message: str) -> None:
    """When the client is created, the error lists the index of each invalid entry."""
    options = LLMOptions.model_construct(**{**LLMOptions().__dict__, "script": entries})

    with pytest.raises(PluginConfigError, match=message):
        ScriptedClient(options)


async def test_latency_passes_before_the_reply() -> None:
    """`latency_ms` of the options or of an entry delays the reply without blocking the event loop."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    options = LLMOptions(latency_ms=250, script=[{"text": "a"}, {"text": "b", "latency_ms": 0}])
    client = ScriptedClient(options, sleep=sleep)

    await _call(client, 0)
    await _call(client, 1)

    assert waits == [0.25]


@pytest.mark.parametrize(
    "make", [lambda text: _scripted({"text": text}), lambda text: MockClient(LLMOptions())]
)
@pytest.mark.parametrize("text", ["", "hello", "  two  words\n\nand more ", "ä 💡 ü"])
async def test_the_pieces_are_the_text(make: Callable[[str], LLMClient], text: str) -> None:
    """A listener gets the reply word by word. Joined, the pieces equal the reply."""
    pieces: list[str] = []

    async def listen(piece: str) -> None:
        pieces.append(piece)

    reply = await make(text).generate(messages=[{"role": "user", "content": text}], on_delta=listen)

    assert "".join(pieces) == reply.output_text


# --- mock ------------------------------------------------------------------------------------------------


@pytest.mark.defect("P08b")
async def test_the_mock_echoes_and_counts_the_history() -> None:
    """The history is all messages before the last user message, except system messages."""
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "hello"},
    ]

    reply = await MockClient(LLMOptions()).generate(messages=messages)

    assert reply.output_text == "Echo: hello (history=2)"


@pytest.mark.defect("P08")
async def test_the_mock_answers_after_the_tool_said_something() -> None:
    """`/tool ID QUERY` makes one tool call. Its result is answered and not requested again."""
    client = MockClient(LLMOptions())
    messages: list[dict[str, Any]] = [{"role": "user", "content": "/tool search red pandas"}]

    asked = await client.generate(messages=messages)
    [call] = asked.tool_calls
    turn = {"id": call.id, "name": call.name, "arguments": dict(call.arguments)}
    result = {"role": "tool", "tool_call_id": call.id, "name": "search", "content": "3 found"}
    answer = await client.generate(
        messages=[*messages, {"role": "assistant", "content": "", "tool_calls": [turn]}, result]
    )

    assert (call.name, call.arguments) == ("search", {"query": "red pandas"})
    assert (answer.output_text, answer.tool_calls) == ("Tool search said: 3 found", ())


# --- providers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", sorted(PROVIDERS.keys() - {"litellm"}))  # see test_litellm.py
async def test_every_provider_is_made_by_its_name(provider: str) -> None:
    """The provider's name in the agents file selects the client, which counts tokens and can be closed."""
    client = make_client(LLMOptions(provider=provider), env={"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"})

    assert client.provider_name == provider
    assert client.count_tokens("12345678") == 2
    await client.aclose()


def test_an_unknown_provider_has_a_suggestion() -> None:
    """For a typo, the hint suggests the similar name."""
    with pytest.raises(PluginLoadError) as caught:
        make_client(LLMOptions(provider="scriptd"), env={})

    assert "did you mean 'scripted'?" in str(caught.value)


def test_a_named_key_must_be_there() -> None:
    """If the agents file sets `api_key_env`, that variable must be set."""
    with pytest.raises(
        PluginConfigError, match=r"llm\.api_key_env: the environment variable MY_KEY is not set"
    ):
        make_client(LLMOptions(provider="openai_compatible", api_key_env="MY_KEY"), env={})


def test_the_base_address_comes_from_the_options_or_the_environment() -> None:
    """`api_base`, otherwise OPENAI_BASE_URL, otherwise OpenAI's URL."""

    def url(env: dict[str, str], **options: Any) -> str:
        client = make_client(LLMOptions(provider="openai_compatible", **options), env=env)
        assert isinstance(client, OpenAICompatibleClient)
        return client.url

    env = {"OPENAI_BASE_URL": "http://env.test/v1"}

    assert url(env, api_base="http://own.test/v1/") == "http://own.test/v1/chat/completions"
    assert url(env) == "http://env.test/v1/chat/completions"
    assert url({"OPENAI_API_KEY": "k"}) == "https://api.openai.com/v1/chat/completions"
