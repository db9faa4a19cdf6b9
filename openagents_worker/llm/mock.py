"""The mock provider: a model that echoes its input, to try an agents file without a provider's account."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from openagents_worker.agents import LLMOptions
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import (
    FinishReason,
    LLMResponse,
    LLMToolCall,
    Message,
    ModelClient,
    ModelRequest,
)
from openagents_worker.llm.largest_cost import largest_cost_usd
from openagents_worker.llm.options import reject_extras
from openagents_worker.llm.pricing import estimate_tokens, estimate_usage, price
from openagents_worker.llm.script import words

__all__ = ["MockClient", "mock_client"]

_DIRECTIVE = re.compile(r"/tool\s+(\S+)\s*(.*)", re.DOTALL)


class MockClient(ModelClient):
    """Echoes the last user message. `/tool ID QUERY` calls that tool, and its result becomes the answer."""

    def __init__(self, options: LLMOptions) -> None:
        self.provider_name = "mock"
        self.is_billed = False
        self.model_id = options.model or "mock"
        self._options = options

    async def respond(self, request: ModelRequest) -> LLMResponse:
        text, calls = _answer(request.messages)
        if request.on_delta is not None:
            for word in words(text):
                await request.on_delta(word)
        reply_text = text + "".join(dumps(dict(call.arguments)) for call in calls)
        name = request.model or self.model_id
        return LLMResponse(
            output_text=text,
            tool_calls=calls,
            usage=price(name, estimate_usage(request.messages, reply_text), self._options.pricing),
            stop_reason="tool_calls" if calls else "stop",
            finish_reason=FinishReason.TOOL_CALLS if calls else FinishReason.STOP,
            model=name,
            provider=self.provider_name,
        )

    def largest_cost_usd(self, request: ModelRequest) -> float | None:
        return largest_cost_usd(request, request.model or self.model_id, self._options)

    def count_tokens(self, text: str) -> int:
        return estimate_tokens(text)

    async def aclose(self) -> None:
        """There is nothing to close."""


def mock_client(options: LLMOptions, env: Mapping[str, str]) -> MockClient:
    """A client of an agents file. Raises `PluginConfigError` for an option of another provider."""
    reject_extras(options)
    return MockClient(options)


def _answer(messages: Sequence[Message]) -> tuple[str, tuple[LLMToolCall, ...]]:
    """The text or the tool calls of the reply. Only a user message can request a tool."""
    last = messages[-1] if messages else {}
    if last.get("role") == "tool":
        return f"Tool {last.get('name') or last.get('tool_call_id')} said: {last.get('content')}", ()
    last_user = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "user"), None)
    text = str(messages[last_user].get("content") or "") if last_user is not None else ""
    if directive := _DIRECTIVE.fullmatch(text.strip()):
        tool_id, query = directive.groups()
        return "", (LLMToolCall(tool_id, {"query": query}, f"call_{len(messages)}"),)
    history = sum(message["role"] != "system" for message in messages[: last_user or 0])
    return f"Echo: {text} (history={history})", ()
