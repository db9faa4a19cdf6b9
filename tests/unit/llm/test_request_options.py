"""Options of `llm`: what a request contains, which options are rejected, and which model answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMError, LLMRateLimitError, LLMReplyFiltered, PluginConfigError
from openagents_worker.llm.base import CallInfo, LLMResponse, current_call
from openagents_worker.llm.openai_options import OpenAIExtras
from openagents_worker.llm.providers import make_client
from tests.unit.llm.raw_server import JSON, Sent, answering, delta, sse, whole

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ANSWER = Sent((json.dumps(whole(content="hi")).encode(),), JSON)
STREAMED = Sent((sse(delta(content="hi"), delta("stop"), "[DONE]"),))


class Server:
    """Records the bodies of its requests, and answers each by the model that it names."""

    def __init__(self, answers: dict[str, Sent] | None = None) -> None:
        self.answers = answers or {}
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, body: dict[str, Any]) -> Sent:
        self.bodies.append(body)
        return self.answers.get(body["model"], STREAMED if body.get("stream") else ANSWER)

    @property
    def models(self) -> list[str]:
        return [body["model"] for body in self.bodies]


async def _ask(server: Server, *, watched: bool = False, tools: Any = TOOLS, **llm: Any) -> LLMResponse:
    heard: list[str] = []

    async def listen(text: str) -> None:
        heard.append(text)

    async with answering(server) as url:
        options = {
            "provider": "openai_compatible",
            "model": "m",
            "api_base": url,
            "retry": {"max_attempts": 1},
        }
        client = make_client(LLMOptions(**options | llm), env={})
        try:
            reply = await client.generate(
                messages=[{"role": "user", "content": "hi"}],
                tools=tools,
                on_delta=listen if watched else None,
            )
        finally:
            await client.aclose()
    assert heard == (["hi"] if watched else [])
    return reply


# --- what is sent ----------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "seed": 7,
    "top_p": 0.5,
    "parallel_tool_calls": False,
    "tool_choice": "required",
    "stop": ["END"],
    "presence_penalty": -1.5,
    "frequency_penalty": 2,
    "logit_bias": {"50256": -100},
    "reasoning_effort": "low",
    "verbosity": "high",
    "service_tier": "flex",
    "prompt_cache_key": "tenant-1",
    "prompt_cache_retention": "24h",
    "user": "u1",
    "safety_identifier": "abc",
    "metadata": {"team": "a"},
    "store": False,
    "modalities": ["text"],
    "audio": {"voice": "alloy", "format": "wav"},
    "logprobs": True,
    "top_logprobs": 3,
    "moderation": {"model": "omni-moderation-latest"},
    "prompt_cache_options": {"mode": "explicit"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {"search_context_size": "low"},
}


def test_the_table_of_options_is_complete() -> None:
    """Every option of the provider is shown here."""
    assert OPTIONS.keys() | {"structured_output", "stream_options"} == OpenAIExtras.model_fields.keys()


async def test_every_option_is_sent() -> None:
    """Unchanged, under the name that the API has for it."""
    server = Server()

    await _ask(server, **OPTIONS)

    assert OPTIONS.items() <= server.bodies[0].items()


async def test_options_of_tools_are_not_sent_without_tools() -> None:
    """The API rejects them."""
    server = Server()

    await _ask(server, tools=None, tool_choice="auto", parallel_tool_calls=True)

    assert server.bodies[0].keys() & {"tools", "tool_choice", "parallel_tool_calls"} == set()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", 7),
        ("presence_penalty", 3),
        ("logit_bias", {"a": "b"}),
        ("metadata", {"a": 1}),
        ("verbosity", "loud"),
        ("store", "no way"),
        ("top_logprobs", 21),
        ("logprobs", "many"),
        ("moderation", "strict"),
        ("extra_body", "x"),
        ("extra_query", {"a": {}}),
    ],
)
def test_an_option_of_another_type_is_rejected(name: str, value: Any) -> None:
    """When the agents file is read, not by the provider at the first call."""
    with pytest.raises((PluginConfigError, ValueError)) as caught:
        make_client(
            LLMOptions(provider="openai_compatible", api_base="http://127.0.0.1:1", **{name: value}), env={}
        )
    assert name in str(caught.value)


def test_an_unknown_option_names_the_similar_one_and_extra_body() -> None:
    """A field that the library does not know belongs into `extra_body`."""
    options = LLMOptions(provider="openai_compatible", api_base="http://127.0.0.1:1", reasoning_efort="low")

    with pytest.raises(PluginConfigError) as caught:
        make_client(options, env={})

    assert "did you mean 'reasoning_effort'?" in str(caught.value)
    assert "llm.extra_body" in str(caught.value)


@pytest.mark.parametrize("name", ["messages", "input", "stream"])
def test_what_the_library_writes_cannot_be_replaced(name: str) -> None:
    """The conversation and the kind of reply."""
    with pytest.raises(ValueError, match=name):
        LLMOptions(extra_body={name: 1})


async def test_further_fields_and_query_parameters() -> None:
    """For what has no option: fields of the body, and the query of Azure, also in `api_base`."""
    paths: list[str] = []
    server = Server()
    async with answering(server, paths=paths) as url:
        options = LLMOptions(
            provider="openai_compatible",
            model="m",
            api_base=f"{url}?api-version=1",
            extra_query={"beta": "true"},
            extra_body={"guided_json": {"type": "object"}},
        )
        client = make_client(options, env={})
        await client.generate(messages=[{"role": "user", "content": "hi"}])
        await client.aclose()

    assert paths == ["/v1/chat/completions?api-version=1&beta=true"]
    assert server.bodies[0]["guided_json"] == {"type": "object"}


@pytest.mark.parametrize(
    ("llm", "sent"),
    [
        ({}, {"stream": True, "stream_options": {"include_usage": True}}),
        ({"stream_options": False}, {"stream": True}),
        ({"stream": False}, {}),
    ],
)
async def test_streaming_can_be_turned_off(llm: dict[str, Any], sent: dict[str, Any]) -> None:
    """A watcher gets the whole text at the end."""
    server = Server()

    await _ask(server, watched=True, **llm)

    fields = {
        name: server.bodies[0][name] for name in ("stream", "stream_options") if name in server.bodies[0]
    }
    assert fields == sent


# --- fallbacks -------------------------------------------------------------------------------------------


def _fails(status: int, message: str = "no", head: str = JSON) -> Sent:
    return Sent((json.dumps({"error": {"message": message}}).encode(),), head, f"{status} No")


@pytest.mark.parametrize("status", [401, 402, 403, 404, 408, 429, 500, 529])
async def test_a_fallback_answers_if_the_model_cannot(status: int) -> None:
    """The reply says which one, and has the price of that model."""
    server = Server({"m": _fails(status)})
    fallback = {"model": "gpt-4o", "pricing": {"input": 1, "output": 1}}

    reply = await _ask(server, fallbacks=[fallback], pricing={"input": 9, "output": 9}, temperature=0.5)

    assert server.models == ["m", "gpt-4o"]
    assert server.bodies[1]["temperature"] == 0.5
    assert reply.usage is not None
    assert reply.usage.metadata["fallback"] == "openai_compatible/gpt-4o"
    assert reply.usage.metadata["cost_usd"] == pytest.approx(
        (reply.usage.input_tokens + reply.usage.output_tokens) / 1e6
    )


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (429, "You exceeded your current quota, please check your plan and billing details."),
        (400, "Your credit balance is too low to access the Anthropic API."),
        (400, "You have reached your specified API usage limits. You will regain access on 2026-12-01."),
        (403, "insufficient_balance"),
        (403, "Your team has used all available credits or reached its monthly spending limit."),
    ],
    ids=["OpenAI", "Anthropic", "Anthropic's own limit", "others", "xAI"],
)
async def test_a_fallback_answers_if_the_account_has_no_quota(status: int, message: str) -> None:
    """Whichever status says so: the account of the other model may have some."""
    server = Server({"m": _fails(status, message)})

    reply = await _ask(server, fallbacks=[{"model": "n"}])

    assert (server.models, reply.output_text) == (["m", "n"], "hi")


@pytest.mark.parametrize(
    ("answer", "watched"),
    [
        (_fails(400), False),
        (_fails(400, "content_filter"), False),
        (_fails(422), False),
        (Sent((sse(delta(content="hi")),)), True),
    ],
    ids=["bad request", "filtered", "not valid", "a broken stream"],
)
async def test_no_fallback_repeats_a_refused_request_or_a_partial_reply(answer: Sent, watched: bool) -> None:
    """Another model would refuse it too, or a watcher would see two replies as one."""
    server = Server({"m": answer})

    with pytest.raises(LLMError):
        await _ask(server, watched=watched, fallbacks=[{"model": "n"}])

    assert server.models == ["m"]


async def test_the_error_of_all_models_is_the_one_that_can_be_retried_first() -> None:
    """It counts all requests, so that the call sends `max_attempts` in all."""
    slow = _fails(429, head=f"{JSON}\r\nretry-after-ms: 9000")
    slower = _fails(429, head=f"{JSON}\r\nretry-after-ms: 60000")
    server = Server({"m": slower, "n": slow})
    info = CallInfo("r", "c", "k", 0, requests=1, may_suspend=True)
    token = current_call.set(info)
    try:
        with pytest.raises(LLMRateLimitError) as caught:
            await _ask(server, fallbacks=[{"model": "n"}], retry={"max_attempts": 4})
    finally:
        current_call.reset(token)

    assert (caught.value.retry_after_ms, caught.value.requests, caught.value.is_final) == (9000, 2, False)


async def test_a_refusal_of_the_last_model_is_the_error() -> None:
    """It is permanent, whatever the others said."""
    server = Server({"m": _fails(500), "n": _fails(400, "content_policy_violation")})

    with pytest.raises(LLMReplyFiltered):
        await _ask(server, fallbacks=[{"model": "n"}])


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        ({"temprature": 1}, "fallbacks[0].temprature"),
        ({"temperature": 9}, "fallbacks[0].temperature"),
        ({"fallbacks": [{}]}, "fallbacks[0].fallbacks"),
        ({"provider": "openai_compatible", "api_base": "ftp://x"}, "fallbacks[0].api_base"),
    ],
)
def test_a_mistake_in_a_fallback_is_found(entry: dict[str, Any], path: str) -> None:
    """When the agents file is read, with the place of the mistake."""
    options = LLMOptions(provider="openai_compatible", api_base="http://127.0.0.1:1", fallbacks=[entry])

    with pytest.raises(PluginConfigError) as caught:
        make_client(options, env={})
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("own", "other"),
    [("api_key_env", "api_key_file"), ("api_key_file", "api_key_env"), ("api_key_env", "api_key_env")],
)
async def test_a_fallback_with_a_key_of_its_own_takes_none_from_the_agent(
    tmp_path: Path, own: str, other: str
) -> None:
    """An agent whose account is limited continues with another account of the same provider."""
    (tmp_path / "key").write_text("plain-key-0000000002")
    values = {"api_key_env": "SECOND", "api_key_file": str(tmp_path / "key")}
    options = LLMOptions(
        provider="openai_compatible",
        api_base="http://127.0.0.1:1",
        **{own: "FIRST" if own == "api_key_env" else str(tmp_path / "key")},
        fallbacks=[{other: values[other]}],
    )
    client: Any = make_client(
        options, env={"FIRST": "plain-key-0000000001", "SECOND": "plain-key-0000000002"}
    )

    assert client._clients[1]._endpoint.keys.value == "plain-key-0000000002"


async def test_a_fallback_of_another_provider_shares_only_the_limits() -> None:
    """Its URL, key and options are its own."""
    server = Server({"m": _fails(500)})
    mock = {"provider": "mock"}

    reply = await _ask(server, fallbacks=[mock], seed=7, max_tokens=50)

    assert reply.provider == "mock"
