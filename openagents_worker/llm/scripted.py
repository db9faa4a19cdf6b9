"""The scripted provider: a model whose replies are listed in the agents file, for tests and demos."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMConnectionError, LLMError, LLMRateLimitError, LLMResponseError
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import (
    FinishReason,
    LLMResponse,
    LLMUsage,
    Message,
    ModelClient,
    ModelRequest,
    current_call,
)
from openagents_worker.llm.conversation import tool_call
from openagents_worker.llm.largest_cost import largest_cost_usd
from openagents_worker.llm.options import reject_extras
from openagents_worker.llm.pricing import estimate_tokens, estimate_usage, price
from openagents_worker.llm.script import ReplyScript, ScriptedFault, ScriptedReply, ScriptedUsage, words

__all__ = ["ScriptedClient", "scripted_client"]

FAULTS = ("connection", "rate_limit", "response")


class ScriptedClient(ModelClient):
    """Answers the n-th model call of a run with the n-th reply of its script, on every attempt and worker.

    Outside of a run it counts the calls of this client. After the last reply it raises `LLMResponseError`.
    """

    def __init__(
        self, options: LLMOptions, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self.provider_name = "scripted"
        self.is_billed = False
        self.model_id = options.model or "scripted"
        self._options = options
        self._script = ReplyScript(options.script or (), faults=FAULTS)
        self._sleep = sleep
        self._call_outside_run = (0, 0)  # number of the next call, and its failed tries so far

    async def respond(self, request: ModelRequest) -> LLMResponse:
        ordinal, failed_tries = self._next_call()
        entry = await self._entry(ordinal, failed_tries, request.messages, request.tools or ())
        await self._wait(entry)
        if entry is None:
            raise LLMResponseError(
                f"the script has ended after {len(self._script)} replies",
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
        """The reply or fault for this try of the call. None: the script has ended."""
        return self._script.entry(ordinal, failed_tries)

    def _next_call(self) -> tuple[int, int]:
        """The number of the call in its run, from 0, and its failed tries so far."""
        if (info := current_call.get()) is not None:
            return info.ordinal, info.failed_tries
        ordinal, failed_tries = self._call_outside_run
        failed = isinstance(self._script.entry(ordinal, failed_tries), ScriptedFault)
        self._call_outside_run = (ordinal, failed_tries + 1) if failed else (ordinal + 1, 0)
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
        finish_reason = entry.finish_reason or (FinishReason.TOOL_CALLS if calls else FinishReason.STOP)
        return LLMResponse(
            output_text=entry.text,
            tool_calls=calls,
            usage=price(model, usage_of(entry, messages), self._options.pricing),
            stop_reason=str(finish_reason),
            finish_reason=finish_reason,
            model=model,
            provider=self.provider_name,
            response_id=f"scripted-{ordinal}",
        )

    def largest_cost_usd(self, request: ModelRequest) -> float | None:
        return largest_cost_usd(request, request.model or self.model_id, self._options)

    def count_tokens(self, text: str) -> int:
        return estimate_tokens(text)

    async def aclose(self) -> None:
        """There is nothing to close."""


_NOTHING_COUNTED = ScriptedUsage()


def scripted_client(options: LLMOptions, env: Mapping[str, str]) -> ScriptedClient:
    """A client of an agents file. Raises `PluginConfigError` for an option of another provider."""
    reject_extras(options)
    return ScriptedClient(options)


def usage_of(entry: ScriptedReply, messages: Sequence[Message]) -> LLMUsage:
    """The token counts of an entry; those that it leaves out are estimated from the texts."""
    scripted = entry.usage or _NOTHING_COUNTED
    input_tokens, output_tokens = scripted.input_tokens, scripted.output_tokens
    if input_tokens is None or output_tokens is None:  # otherwise the whole conversation need not be read
        reply_text = entry.text + "".join(dumps(call.arguments) for call in entry.tool_calls)
        estimate = estimate_usage(messages, reply_text)
        input_tokens = estimate.input_tokens if input_tokens is None else input_tokens
        output_tokens = estimate.output_tokens if output_tokens is None else output_tokens
    metadata = {"cached_tokens": scripted.cached_tokens} if scripted.cached_tokens else {}
    return LLMUsage(input_tokens, output_tokens, input_tokens + output_tokens, metadata)


def _failure(fault: ScriptedFault) -> LLMError:
    if fault.error == "rate_limit":
        text = fault.message or "scripted: rate limit"
        return LLMRateLimitError(text, retry_after_ms=fault.retry_after_ms)
    if fault.error == "connection":
        return LLMConnectionError(fault.message or "scripted: connection lost")
    return LLMResponseError(fault.message or "scripted: the request was refused")
