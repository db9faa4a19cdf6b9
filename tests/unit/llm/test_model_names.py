"""What the name of a model, or of its host, changes in a request."""

from __future__ import annotations

import pytest

from openagents_worker.agents import LLMOptions
from openagents_worker.llm.base import ModelRequest
from openagents_worker.llm.endpoints import bearer_headers
from openagents_worker.llm.openai_chat import ChatCompletions
from openagents_worker.llm.openai_responses import OpenAIResponses, ResponsesExtras
from tests.unit.llm.wire import HI

OPTIONS = LLMOptions(temperature=0.5, max_tokens=100)


@pytest.mark.parametrize(
    ("model", "thinks"),
    [
        ("o3-mini", True),
        ("gpt-5", True),
        ("openai/gpt-5.1", True),
        ("gpt-5.1-chat-latest", True),
        ("gpt-6-astra", True),
        ("gpt-5-chat-latest", False),
        ("gpt-4o", False),
        ("gpt-oss-120b", False),
    ],
)
def test_only_models_that_think_get_the_parameters_of_models_that_think(model: str, thinks: bool) -> None:
    """They reject the others, and gpt-5-chat rejects the request for encrypted reasoning."""
    request = ModelRequest(HI)
    chat = ChatCompletions(OPTIONS, {}).body(request, model)
    response = OpenAIResponses(OPTIONS, ResponsesExtras()).body(request, model)

    assert ("temperature" in chat, "max_tokens" in chat) == (not thinks, not thinks)
    assert ("max_completion_tokens" in chat, "include" in response) == (thinks, thinks)
    assert ("temperature" in response) is not thinks


@pytest.mark.parametrize("end", ["com", "us", "cn"])
def test_every_cloud_of_azure_gets_the_key_in_its_own_header(end: str) -> None:
    """Also those for the US government and China."""
    headers = bearer_headers(LLMOptions(api_base=f"https://ours.openai.azure.{end}/openai/v1"))("k")

    assert headers["api-key"] == "k"
    assert "api-key" not in bearer_headers(LLMOptions(api_base="https://api.openai.com/v1"))("k")
