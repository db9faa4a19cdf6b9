"""Whole runs against model servers that others wrote: llama.cpp, LiteLLM's proxy, and a mock server.

A real worker process executes the runs. Each server runs in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.extras import server_programs as servers
from tests.support.deployment import PATIENCE_S, Installation, agent, installed

pytestmark = [pytest.mark.extras, pytest.mark.timeout(1200)]

FORMATS = ("openai_compatible", "openai_responses", "anthropic")
COUNT = {"count": "tests.worker.workshop.count"}
EVERY = pytest.mark.parametrize("provider", FORMATS)
KEYS = {"OPENAI_API_KEY": servers.MASTER_KEY, "ANTHROPIC_API_KEY": servers.MASTER_KEY}


# --- llama.cpp -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Generator[Installation]:
    folder = tmp_path_factory.mktemp("llama")
    programs = servers.environment(folder / "env", "xllamacpp", "gguf", "numpy")
    with servers.llama(programs, folder) as url:
        llms = {
            name: {"provider": name, "api_base": url, "model": "tiny", "max_tokens": 60} for name in FORMATS
        }
        short = {"pattern": {"type": "react", "config": {"accept_truncated": True}}}
        agents = [agent(name, llm=llm, **short) for name, llm in llms.items()]
        # Without the end of its text among the tokens, a random model never ends by itself.
        endless = {**llms["openai_compatible"], "extra_body": {"ignore_eos": True}}
        agents.append(agent("strict", llm=endless))
        with installed(folder, *agents, **KEYS) as installation:
            yield installation


@EVERY
def test_llama_answers_in_each_of_its_formats(llama: Installation, provider: str) -> None:
    """With random bytes, which are text for the result, the events and the journal."""
    handle = llama.submit(provider, "hi")
    result = handle.wait(PATIENCE_S)

    assert result.error_details is None
    assert isinstance(result.final_output, str)
    assert result.usage.output_tokens > 0
    # Under load, its stream in the format of Anthropic may begin with 0 input tokens.
    assert result.usage.input_tokens > 0 or provider == "anthropic"
    result.final_output.encode()


def test_llama_fits_the_type_of_the_output_at_once(llama: Installation) -> None:
    """The schema reaches its grammar, so that a random model writes a valid answer with its first reply."""
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    result = llama.submit("openai_compatible", "How are you?", output_type=schema).wait(PATIENCE_S)

    assert result.final_output in ({"mood": "good"}, {"mood": "bad"})
    assert result.usage.llm_calls == 1


def test_a_reply_of_llama_that_was_cut_is_not_an_answer(llama: Installation) -> None:
    """Unless the pattern accepts it."""
    result = llama.submit("strict", "hi").wait(PATIENCE_S)

    assert result.error_details is not None
    assert result.error_details.code == "llm.truncated"


# --- LiteLLM's proxy -------------------------------------------------------------------------------------


def _reply(request: ModelServerRequest) -> dict[str, Any]:
    if "fail" in str(request.messages[-1]["content"]):
        return {"error": "response", "message": "the request is wrong"}
    if request.tools and request.n == 0:
        return {"text": "I count.", "tool_calls": [{"name": "count", "arguments": {"number": 7}}]}
    return {"text": "It is counted.", "usage": {"input_tokens": 30, "output_tokens": 4}}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Generator[Installation]:
    folder = tmp_path_factory.mktemp("proxy")
    programs = servers.environment(folder / "env", "litellm[proxy]")
    with (
        ModelServer(_reply).serve_in_thread() as model,
        servers.litellm_proxy(programs, folder, model_url=model.url) as url,
    ):
        models = dict(zip(FORMATS, ("gpt-4o-mini", "gpt-4o-mini", "claude-sonnet-4-5"), strict=True))
        agents = [
            agent(name, tools=COUNT, llm={"provider": name, "api_base": url, "model": model_name})
            for name, model_name in models.items()
        ]
        agents.append(agent("mock", llm={"api_base": url, "model": "mock"}))
        with installed(folder, *agents, **KEYS) as installation:
            yield installation


@EVERY
def test_a_run_with_a_tool_goes_through_the_proxy(proxy: Installation, provider: str) -> None:
    """Call, result and answer, streamed, in each format of the proxy."""
    handle = proxy.submit(provider)
    result = handle.wait(PATIENCE_S)

    assert result.error_details is None
    assert result.final_output == "It is counted."
    assert [line["number"] for line in proxy.diary(handle.id) if line["what"] == "begin"] == [7]
    assert result.usage.llm_calls == 2


def test_the_proxys_own_mock_is_an_answer(proxy: Installation) -> None:
    """It streams its text in pieces of a few characters."""
    result = proxy.submit("mock", "hi").wait(PATIENCE_S)

    assert (result.error_details, result.final_output) == (None, "It is a mock.")


@EVERY
def test_an_error_behind_the_proxy_has_the_text_of_its_provider(proxy: Installation, provider: str) -> None:
    """It is not retried by the worker: the proxy passes its status on."""
    result = proxy.submit(provider, "fail").wait(PATIENCE_S)

    assert result.error_details is not None
    assert result.error_details.code == "llm.response"
    assert "the request is wrong" in result.error_details.message


# --- a mock server ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Generator[Installation]:
    folder = tmp_path_factory.mktemp("fakellm")
    programs = servers.environment(folder / "env", "fakellm")
    with servers.fakellm(programs, folder) as url:
        agents = [
            agent(name, tools=COUNT, llm={"provider": name, "api_base": url})
            for name in ("openai_compatible", "anthropic")
        ]
        agents.append(agent("plain", llm={"api_base": url, "stream": False}))  # its streams have no errors
        with installed(folder, *agents, **KEYS) as installation:
            yield installation


@pytest.mark.parametrize("provider", ["openai_compatible", "anthropic"])
def test_a_run_with_a_tool_ends_at_the_mock_server(fake: Installation, provider: str) -> None:
    """It streams the arguments in fragments."""
    handle = fake.submit(provider, f"Count for {provider}.")
    result = handle.wait(PATIENCE_S)

    assert result.error_details is None
    assert result.final_output == "It is counted."
    assert [line["number"] for line in fake.diary(handle.id) if line["what"] == "begin"] == [7]


def test_an_error_of_the_mock_server_is_shown(fake: Installation) -> None:
    """With its own words."""
    result = fake.submit("plain", "This is too much").wait(PATIENCE_S)

    assert result.error_details is not None
    assert "This is too much." in result.error_details.message
