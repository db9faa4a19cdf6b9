"""The scripted provider: a model whose replies stand in the agents file, for tests and demos."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMConnectionError, LLMError, LLMRateLimitError, LLMResponseError
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import LLMResponse, LLMUsage, Message, ModelClient, ModelRequest, current_call
from openagents_worker.llm.conversation import tool_call
from openagents_worker.llm.pricing import estimate_tokens, estimate_usage, price
from openagents_worker.llm.script import ReplyScript, ScriptedFault, ScriptedReply, ScriptedUsage, words

__all__ = ["ScriptedClient"]

FAULTS = ("connection", "rate_limit", "response")


class ScriptedClient(ModelClient):
    """Gives the n-th reply of its script to a run's n-th recorded model call, on every attempt and worker.

    Outside of a run it counts its own calls instead. After the last reply: `LLMResponseError`.
    """

    def __init__(
        self, options: LLMOptions, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self.provider_name = "scripted"
        self.model_id = options.model or "scripted"
        self._options = options
        self._script = ReplyScript(options.script or (), faults=FAULTS)
        self._sleep = sleep
        self._own_call = (0, 0)  # calls and failed tries outside of a run

    async def respond(self, request: ModelRequest) -> LLMResponse:
        ordinal, failed_tries = self._next_call()
        entry = await self._entry(ordinal, failed_tries, request.messages, request.tools or ())
        await self._wait(entry)
        if entry is None:
            raise LLMResponseError(
                f"script ended after {len(self._script)} replies",
                hint="add a reply for this model call to the agent's llm.script",
            )
        if isinstance(entry, ScriptedFault):
            raise _failure(entry)
        if request.on_delta is not None:
            for word in words(entry.text):
                await request.on_delta(word)
        return self._response(entry, ordinal, request.messages, request.model or self.model_id)

    async def _entry(
        self, ordinal: int, failed_tries: int, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> ScriptedReply | ScriptedFault | None:
        """What this try of the call meets; None: there is nothing left to say."""
        return self._script.entry(ordinal, failed_tries)

    def _next_call(self) -> tuple[int, int]:
        if (info := current_call.get()) is not None:
            return info.ordinal, info.failed_tries
        ordinal, failed_tries = self._own_call
        failed = isinstance(self._script.entry(ordinal, failed_tries), ScriptedFault)
        self._own_call = (ordinal, failed_tries + 1) if failed else (ordinal + 1, 0)
        return ordinal, failed_tries

    async def _wait(self, entry: ScriptedReply | ScriptedFault | None) -> None:
        own = entry.latency_ms if entry is not None else None
        if latency_ms := self._options.latency_ms if own is None else own:
            await self._sleep(latency_ms / 1000)

    def _response(
        self, entry: ScriptedReply, ordinal: int, messages: Sequence[Message], model: str
    ) -> LLMResponse:
        calls = tuple(
            tool_call(
                f"call_{ordinal}_{index}" if call.id is None else call.id,
                call.name,
                call.arguments if isinstance(call.arguments, str) else dumps(call.arguments),
            )
            for index, call in enumerate(entry.tool_calls)
        )
        return LLMResponse(
            output_text=entry.text,
            tool_calls=calls,
            usage=price(model, usage_of(entry, messages), self._options.pricing),
            stop_reason="tool_calls" if calls else "stop",
            model=model,
            provider=self.provider_name,
            response_id=f"scripted-{ordinal}",
        )

    def count_tokens(self, text: str) -> int:
        return estimate_tokens(text)

    async def aclose(self) -> None:
        """Nothing to close."""


def usage_of(entry: ScriptedReply, messages: Sequence[Message]) -> LLMUsage:
    """The tokens an entry says, or about those its texts have."""
    said = entry.usage or ScriptedUsage()
    asked, answered = said.input_tokens, said.output_tokens
    if asked is None or answered is None:  # else the conversation, which may be long, need not be read
        guess = estimate_usage(messages, entry.text + "".join(dumps(c.arguments) for c in entry.tool_calls))
        asked = guess.input_tokens if asked is None else asked
        answered = guess.output_tokens if answered is None else answered
    metadata = {"cached_tokens": said.cached_tokens} if said.cached_tokens else {}
    return LLMUsage(asked, answered, asked + answered, metadata)


def _failure(fault: ScriptedFault) -> LLMError:
    if fault.error == "rate_limit":
        text = fault.message or "scripted: rate limit"
        return LLMRateLimitError(text, retry_after_ms=fault.retry_after_ms)
    if fault.error == "connection":
        return LLMConnectionError(fault.message or "scripted: connection lost")
    return LLMResponseError(fault.message or "scripted: the request was refused")
