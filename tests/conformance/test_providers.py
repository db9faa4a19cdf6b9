"""Every provider of models: a run with a tool call, over real HTTP where the provider speaks HTTP."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from openagents_worker import Agent, tool
from openagents_worker.llm.providers import PROVIDERS
from openagents_worker.models import RunState
from openagents_worker.testing.model_server import ModelServer
from tests.support.runner import calls, process, scripted

REPLIES = [calls(("look", {"query": "pandas"})), {"text": "2 pandas"}]
QUESTION = "/tool look pandas"  # what the mock understands


def over_http(provider: str, model: str = "m", **more: Any) -> Callable[[str], dict[str, Any]]:
    return lambda url: {"provider": provider, "model": model, "api_base": url, **more}


LLM: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "anthropic": over_http("anthropic"),
    "litellm": over_http("litellm", "openai/gpt-4o-mini"),
    "mock": lambda _: {"provider": "mock"},
    "openai_compatible": over_http("openai_compatible"),
    "openai_responses": over_http("openai_responses"),
    "scripted": lambda _: scripted(*REPLIES),
}
"""The options of each provider, for a server with this URL."""


@tool
async def look(query: str) -> str:
    """Looks something up."""
    return f"2 {query}"


@pytest.mark.parametrize("provider", sorted(PROVIDERS))
async def test_a_run_with_a_tool_call(redis_url: str, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool is called once with the arguments of the model; its result is in the answer; each call of the
    model is recorded and counted."""
    if provider == "litellm" and importlib.util.find_spec("litellm") is None:
        pytest.skip("the extra litellm is not installed; tests/extras runs it")
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "k")
    async with ModelServer(REPLIES) as server:
        definition = Agent("a", tools=[look], llm=LLM[provider](server.url))
        async with process(redis_url, definition) as p:
            record = await p.run(input_text=QUESTION)
            assert record.state is RunState.COMPLETED, record.result
            assert record.result is not None
            assert "2 pandas" in str(record.result.final_output)
            kinds = [entry["kind"] for entry in await p.journal()]
            assert (kinds.count("model"), kinds.count("tool")) == (2, 1)
            usage = record.usage
            assert (usage.llm_calls, usage.tool_calls) == (2, 1)
            assert usage.input_tokens > 0
            assert usage.output_tokens > 0
