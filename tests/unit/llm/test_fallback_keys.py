"""Which key a fallback sends: the agent's only goes to another address if the entry says so."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from openagents_worker import register_api_keys
from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMAuthError, PluginConfigError
from openagents_worker.llm import api_keys
from openagents_worker.llm.fallback_keys import key_problems
from openagents_worker.llm.fallbacks import fallback_options
from openagents_worker.llm.providers import make_client
from openagents_worker.testing.model_server import ModelServer
from tests.unit.llm.raw_server import JSON, Sent, answering
from tests.unit.llm.wire import HI, Heard

CHAT: dict[str, Any] = {"provider": "openai_compatible", "model": "m"}
OURS = {**CHAT, "api_base": "https://ours.example/v1"}
NAMED = {**OURS, "api_key_env": "OUR_KEY"}
OTHER = {"api_base": "https://other.example/v1"}
ENV = {"OUR_KEY": "our-key-0001", "OTHER_KEY": "other-key-02", "OPENAI_API_KEY": "openai-key-03"}
NOWHERE = "http://127.0.0.1:1/v1"


@pytest.fixture(autouse=True)
def _unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "_resolver", None)


def problems(agent: dict[str, Any], entry: dict[str, Any], env: dict[str, str] = ENV) -> list[str]:
    try:
        make_client(LLMOptions(**agent, fallbacks=[entry]), env=env)
    except PluginConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


# --- what is a mistake -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent", "entry", "secrets"),
    [
        (NAMED, OTHER, ["OUR_KEY"]),
        (OURS, OTHER, ["OPENAI_API_KEY"]),
        (NAMED, {**OTHER, "api_key_env": None}, ["OPENAI_API_KEY"]),
        (CHAT, {"api_base": "https://openrouter.ai/api/v1"}, ["OPENAI_API_KEY"]),
        (NAMED, {"api_base": "http://ours.example/v1"}, ["OUR_KEY"]),
        (NAMED, {"api_base": "https://ours.example:8443/v1"}, ["OUR_KEY"]),
        (NAMED, {"stream_endpoint": "https://other.example/v1/chat/completions"}, ["OUR_KEY"]),
        ({**OURS, "extra_headers": {"X-Api-Key": "s", "X-Title": "t"}}, OTHER, ["extra_headers.X-Api-Key"]),
        (
            {**NAMED, "extra_headers": {"Ocp-Apim-Subscription-Key": "s"}, "extra_query": {"key": "s"}},
            {**OTHER, "api_key_env": "OTHER_KEY"},
            ["extra_headers.Ocp-Apim-Subscription-Key", "extra_query.key"],
        ),
        ({**OURS, "extra_body": {"api_key": "s", "prompt_cache_key": "p"}}, OTHER, ["extra_body.api_key"]),
    ],
)
def test_a_secret_of_the_agent_goes_to_no_other_address_without_a_word(
    agent: dict[str, Any], entry: dict[str, Any], secrets: list[str]
) -> None:
    """`validate` names what would be sent, and what to write."""
    found = [each for each in problems(agent, entry) if "another address" in each]

    assert len(found) == 1
    assert found[0].startswith("fallbacks[0].")
    for secret in secrets:
        assert secret in found[0]
    assert '"share_key": true' in found[0]
    assert "X-Title" not in found[0]
    assert "prompt_cache_key" not in found[0]


@pytest.mark.parametrize(
    ("agent", "entry", "env"),
    [
        (NAMED, {"model": "n"}, ENV),
        (NAMED, {"api_base": "https://OURS.example:443/other/v1"}, ENV),
        (NAMED, {**OTHER, "api_key_env": "OTHER_KEY"}, ENV),
        (NAMED, {**OTHER, "api_key_env": "OUR_KEY"}, ENV),
        (NAMED, {**OTHER, "share_key": True}, ENV),
        (NAMED, {**OTHER, "share_key": False}, ENV),
        (NAMED, {"provider": "openai_compatible", **OTHER}, ENV),
        (NAMED, {"provider": "mock"}, ENV),
        (OURS, OTHER, {}),
        (CHAT, {"api_base": "https://api.openai.com/v1"}, ENV),
        (CHAT, {"api_base": "https://gate.example/v1"}, {**ENV, "OPENAI_BASE_URL": "https://gate.example"}),
        ({"provider": "mock"}, OTHER, ENV),
        ({**NAMED, "extra_headers": {"X-Title": "t"}}, {**OTHER, "api_key_env": "OTHER_KEY"}, ENV),
        (
            {**NAMED, "extra_headers": {"X-Api-Key": "s"}},
            {**OTHER, "api_key_env": "OTHER_KEY", "extra_headers": {}},
            ENV,
        ),
    ],
)
def test_an_entry_that_is_safe_or_says_what_it_wants_is_accepted(
    agent: dict[str, Any], entry: dict[str, Any], env: dict[str, str]
) -> None:
    assert problems(agent, entry, env) == []


LITELLM = {"provider": "litellm", "api_key_env": "OUR_KEY"}


@pytest.mark.parametrize(
    ("model", "entry", "is_elsewhere"),
    [
        ("bedrock/nova-pro", {"model": "bedrock/nova-lite"}, False),
        ("bedrock/nova-pro", {"model": "openrouter/nova"}, True),
        ("gpt-4o", {"model": "gpt-4o-mini"}, False),
        ("gpt-4o", {"model": "claude-sonnet-4-5"}, True),
        ("gpt-4o", {"model": "gpt-4o", "custom_llm_provider": "azure"}, True),
        ("azure/gpt-4o", {"model": "azure/gpt-4o", "api_base": "https://other.example"}, True),
    ],
)
def test_with_litellm_the_name_of_the_model_is_a_part_of_the_address(
    model: str, entry: dict[str, Any], is_elsewhere: bool
) -> None:
    """LiteLLM sends a key that it is given to whichever service the name says."""
    agent = LLMOptions(**LITELLM, model=model, fallbacks=[entry])
    (fields,) = fallback_options(agent)

    found = list(key_problems(agent, entry, LLMOptions.model_validate(fields), ENV))

    assert bool(found) is is_elsewhere


def test_the_key_in_a_file_is_the_agents_key_too(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("a-key-in-a-file")

    (found,) = problems({**OURS, "api_key_file": str(file)}, OTHER, {})

    assert str(file) in found


def test_the_key_of_a_function_is_the_agents_key_too() -> None:
    register_api_keys(lambda provider, tenant: "a-key-of-a-tenant")

    (found,) = problems(OURS, OTHER, {})

    assert "the function of register_api_keys" in found


@pytest.mark.parametrize(
    ("agent", "entry", "path"),
    [
        (NAMED, {**OTHER, "share_key": "sometimes"}, "fallbacks[0].share_key"),
        (NAMED, {**CHAT, **OTHER, "share_key": True}, "fallbacks[0].share_key"),
        ({**NAMED, "share_key": True}, {}, "share_key"),
    ],
)
def test_share_key_belongs_into_an_entry_without_a_provider(
    agent: dict[str, Any], entry: dict[str, Any], path: str
) -> None:
    assert problems(agent, entry)[0].startswith(f"{path}: ")


# --- what is sent ----------------------------------------------------------------------------------------


@pytest.fixture
def seen() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def server(seen: list[dict[str, Any]]) -> Generator[ModelServer]:
    def reply(request: Any) -> dict[str, Any]:
        seen.append(dict(request.headers))
        return {"text": "hello"}

    with ModelServer(reply).serve_in_thread() as server:
        yield server


async def answered(agent: dict[str, Any], entry: dict[str, Any], **listener: Any) -> str:
    """The answer of the fallback: the agent's own model cannot be reached."""
    retry = {"max_attempts": 1}
    client = make_client(
        LLMOptions(**{**agent, "api_base": NOWHERE, "retry": retry, "fallbacks": [entry]}), env=ENV
    )
    try:
        return (await client.generate(messages=list(HI), **listener)).output_text
    finally:
        await client.aclose()


HEADERS = {"X-Api-Key": "secret-header", "X-Title": "title"}


@pytest.mark.parametrize(
    ("said", "key", "headers"),
    [
        ({"share_key": True}, "Bearer our-key-0001", HEADERS),
        ({"share_key": False}, None, {"X-Title": "title"}),
        ({"share_key": "false"}, None, {"X-Title": "title"}),
        ({"share_key": False, "api_key_env": "OTHER_KEY"}, "Bearer other-key-02", {"X-Title": "title"}),
        ({"share_key": True, "api_key_env": "OTHER_KEY"}, "Bearer other-key-02", HEADERS),
    ],
)
async def test_the_entry_decides_what_is_sent(
    server: ModelServer,
    seen: list[dict[str, Any]],
    said: dict[str, Any],
    key: str | None,
    headers: dict[str, str],
) -> None:
    """A variable of the environment gives a text. OPENAI_API_KEY is not sent in place of the agent's key."""
    await answered({**NAMED, "extra_headers": HEADERS}, {"api_base": server.url, **said})

    assert seen[0].get("authorization") == key
    assert {name: seen[0][name.lower()] for name in HEADERS if name.lower() in seen[0]} == headers


async def test_a_function_is_not_asked_for_an_entry_without_a_key(
    server: ModelServer, seen: list[dict[str, Any]]
) -> None:
    register_api_keys(lambda provider, tenant: "a-key-of-a-tenant")

    await answered(OURS, {"api_base": server.url, "share_key": False})

    assert "authorization" not in seen[0]


async def test_a_refusal_says_that_no_key_was_sent() -> None:
    async with answering(lambda _: Sent((b"{}",), JSON, "401 No")) as url:
        entry = {"api_base": url.replace("127.0.0.1", "localhost"), "share_key": False}
        client = make_client(LLMOptions(**{**NAMED, "api_base": url, "fallbacks": [entry]}), env=ENV)
        with pytest.raises(LLMAuthError) as caught:
            await client.generate(messages=list(HI))
        await client.aclose()

    assert "share_key is false" in str(caught.value.hint)


async def test_the_address_for_streams_of_the_agent_is_not_taken_by_another_address(
    server: ModelServer, seen: list[dict[str, Any]]
) -> None:
    """The key of the entry would go to the agent's host. A path is taken: it is below `api_base`."""
    agent = {**NAMED, "stream_endpoint": "https://ours.example/v1/chat/completions"}

    text = await answered(agent, {"api_base": server.url, "api_key_env": "OTHER_KEY"}, on_delta=Heard())

    assert text == "hello"
    assert seen[0]["authorization"] == "Bearer other-key-02"
    (with_path,) = fallback_options(LLMOptions(**OURS, stream_endpoint="stream", fallbacks=[OTHER]))
    assert with_path["stream_endpoint"] == "stream"
