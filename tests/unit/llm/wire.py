"""What the tests of the wire formats share: each provider's client at the model server, and its parts.

Real in it: the clients, the codecs, and the HTTP server that checks requests as the provider does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.agents import LLMOptions
from openagents_worker.jsontext import dumps
from openagents_worker.llm.anthropic_messages import AnthropicExtras, AnthropicMessages
from openagents_worker.llm.anthropic_replies import StreamedMessage
from openagents_worker.llm.base import LLMClient, LLMResponse, ModelRequest
from openagents_worker.llm.http import HttpModelClient, Timing
from openagents_worker.llm.openai_chat import ChatCompletions
from openagents_worker.llm.openai_chat_stream import StreamedReply
from openagents_worker.llm.openai_responses import OpenAIResponses, ResponsesExtras, StreamedResponse
from openagents_worker.llm.providers import make_client
from openagents_worker.testing.model_server.anthropic_rules import checked_request
from openagents_worker.testing.model_server.connection import ReceivedRequest
from openagents_worker.testing.model_server.openai_responses_rules import check_response_request
from openagents_worker.testing.model_server.openai_rules import check_request

__all__ = ["ANTHROPIC", "CHAT", "FORMATS", "HI", "RESPONSES", "TOOLS", "Format", "Heard", "client_of"]

KEY = "sk-very-secret-key"
HI = [{"role": "user", "content": "hi"}]
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
]


@dataclass(frozen=True)
class Format:
    """One wire format: its codec, the reader of its streams, and the rules of its provider."""

    provider: str
    model: str
    codec: Callable[[], Any]
    reader: Callable[[], Any]
    check: Callable[[dict[str, Any]], Any]
    options: dict[str, Any]

    def body(self, messages: Sequence[Any], **request: Any) -> dict[str, Any]:
        """The body of a request, as the codec makes it."""
        body: dict[str, Any] = self.codec().body(ModelRequest(messages, **request), self.model)
        return body


def _check_anthropic(body: dict[str, Any]) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    checked_request(ReceivedRequest("POST", "/v1/messages", headers, dumps(body).encode("utf-8", "replace")))


CHAT = Format(
    "openai_compatible",
    "gpt-4o",
    lambda: ChatCompletions(LLMOptions(provider="openai_compatible"), {}),
    StreamedReply,
    check_request,
    {},
)
ANTHROPIC = Format(
    "anthropic",
    "claude-sonnet-4-5",
    lambda: AnthropicMessages(LLMOptions(provider="anthropic"), AnthropicExtras()),
    StreamedMessage,
    _check_anthropic,
    {},
)
RESPONSES = Format(
    "openai_responses",
    "gpt-5",
    lambda: OpenAIResponses(LLMOptions(provider="openai_responses"), ResponsesExtras()),
    StreamedResponse,
    check_response_request,
    {},
)
FORMATS = (CHAT, ANTHROPIC, RESPONSES)


class Heard:
    """An `on_delta` listener that records its pieces."""

    def __init__(self) -> None:
        self.pieces: list[str] = []

    async def __call__(self, piece: str) -> None:
        self.pieces.append(piece)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


async def _no_pause(_: float) -> None: ...


def client_of(wire: Format, url: str, **options: Any) -> HttpModelClient:
    """A client that does not wait between its tries."""
    values = {"provider": wire.provider, "model": wire.model, "api_base": url, **wire.options, **options}
    env = {"OPENAI_API_KEY": KEY, "ANTHROPIC_API_KEY": KEY}
    client = make_client(LLMOptions(**values), env=env)
    assert isinstance(client, HttpModelClient)
    client._timing = Timing(sleep=_no_pause, random=lambda: 1.0)
    return client


async def ask(client: LLMClient, messages: Sequence[Any] = HI, **call: Any) -> LLMResponse:
    """One reply; the client is closed afterwards."""
    try:
        return await client.generate(messages=list(messages), **call)
    finally:
        await client.aclose()
