"""OpenAI-compatible servers over HTTP: the only place that asks one for a chat completion."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import (
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    PluginConfigError,
)
from openagents_worker.llm.base import LLMResponse, OnDelta, current_call
from openagents_worker.llm.pricing import estimate_tokens, estimate_usage, price
from openagents_worker.llm.retry import pause_ms, retry_after_ms
from openagents_worker.llm.sse import SSEDecoder
from openagents_worker.llm.wire import StreamedReply, messages_to_wire, reply_from_wire
from openagents_worker.models import dumps

__all__ = ["OpenAICompatibleClient"]

DEFAULT_MODEL = "gpt-4o-mini"
CONNECT_TIMEOUT_S = 5.0
MAX_MESSAGE_CHARS = 500  # of a provider's error message; some send a page of HTML
DRAIN_S = 0.5  # how long the last bytes after [DONE] are waited for, to keep the connection
# More than the runs of one process, so that no run waits for another's model; few of them stay open idle.
LIMITS = httpx.Limits(max_connections=2000, max_keepalive_connections=200)

_REASONING = re.compile(r"(?:.*/)?(o1|o3|o4|gpt-5)")
_HEADER_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?")
_ASKED_WRONGLY = ("invalid", "context_length", "content_filter", "content_policy", "not_found", "unsupported")


class _Extras(BaseModel):
    """The options that only this provider knows; they go into the request as they are."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seed: int | None = None
    top_p: float | None = Field(default=None, ge=0, le=1)
    parallel_tool_calls: bool | None = None


class OpenAICompatibleClient:
    """A model behind `POST {api_base}/chat/completions`: OpenAI itself, vLLM, Ollama, gateways.

    Streams when somebody listens (`on_delta`). A failed request is repeated here as `options.retry` says,
    a streamed one only until the first piece of text has been handed out. Raises `LLMRateLimitError` (429,
    or a server error that names the time to come back), `LLMConnectionError` (transport, 408, 5xx, a torn
    stream) or `LLMResponseError` (everything else, with the provider's own message). The key never shows.
    """

    def __init__(
        self,
        options: LLMOptions,
        *,
        api_key: str | None,
        http: httpx.AsyncClient | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `PluginConfigError` for options that cannot work. A given `http` stays the caller's."""
        self.provider_name = "openai_compatible"
        self.model_id = options.model or DEFAULT_MODEL
        self._options = options
        self._extras = _checked_extras(options)
        self._url, self._stream_url = _endpoints(options)
        self._headers = _headers(options, api_key)
        self._secrets = [value for value in (api_key, *options.extra_headers.values()) if value]
        self._key_env = options.api_key_env or "OPENAI_API_KEY"
        self._http, self._owns_http = http, http is None
        self._sleep, self._random, self._clock = sleep, random, clock

    async def generate(
        self,
        *,
        messages: list[dict[str, Any]],
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: dict[str, Any] | str | None = None,
        response_format: dict[str, Any] | None = None,
        on_delta: OnDelta | None = None,
    ) -> LLMResponse:
        body: dict[str, Any] = {
            "model": model or self.model_id,
            "messages": messages_to_wire(messages),
            **self._sampling(model or self.model_id, temperature, max_tokens),
            "tools": tools or None,
            "tool_choice": tool_choice if tools else None,
            "response_format": response_format,
            **self._extras,
        }
        if not tools:
            body.pop("parallel_tool_calls", None)  # OpenAI refuses it without tools
        if on_delta is not None:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        exchange = _Exchange(
            body={name: value for name, value in body.items() if value is not None}, on_delta=on_delta
        )
        reply = await self._ask(exchange)
        usage = reply.usage
        if usage is None:  # not every server counts
            usage = estimate_usage(messages, reply.output_text)
            usage = replace(usage, metadata={"estimated": True})
        usage = replace(usage, metadata={**usage.metadata, **exchange.measures})
        return replace(reply, usage=price(body["model"], usage, self._options.pricing))

    def count_tokens(self, text: str) -> int:
        return estimate_tokens(text)

    async def aclose(self) -> None:
        """Close the connections that this client opened."""
        if self._owns_http and self._http is not None:
            http, self._http = self._http, None
            await http.aclose()

    # --- tries -------------------------------------------------------------------------------------------

    async def _ask(self, exchange: _Exchange) -> LLMResponse:
        started = self._clock()
        for tries in itertools.count(1):
            try:
                reply = await self._try(exchange)
            except LLMError as error:
                pause = self._pause_ms(error, exchange, tries, (self._clock() - started) * 1000)
                if pause is None:
                    raise
                await self._sleep(pause / 1000)
            else:
                exchange.measures["retries"] = tries - 1
                return reply
        raise AssertionError("unreachable: the count has no end")

    def _pause_ms(
        self, error: LLMError, exchange: _Exchange, tries: int, spent_ms: float
    ) -> float | None:
        retry = self._options.retry
        lost_connection = isinstance(error.__cause__, httpx.TransportError)
        if exchange.handed_out or (lost_connection and not retry.retry_on_connection_errors):
            return None
        return pause_ms(retry, error, tries=tries, spent_ms=spent_ms, random=self._random)

    async def _try(self, exchange: _Exchange) -> LLMResponse:
        try:
            return reply_from_wire(await self._body(exchange), provider=self.provider_name)
        except httpx.TransportError as error:
            problem = self._presentable(f"{type(error).__name__}: {error}")
            raise LLMConnectionError(
                f"{self.provider_name}: no whole reply from {httpx.URL(self._url).host} ({problem})",
                hint="check llm.api_base, and llm.timeout_ms if the model is slow",
            ) from error
        except httpx.HTTPError as error:
            raise LLMResponseError(f"{self.provider_name}: {type(error).__name__}") from error

    async def _body(self, exchange: _Exchange) -> dict[str, Any]:
        """Send the request once; the body of its reply, however it came."""
        streaming = exchange.on_delta is not None
        asked_at = self._clock()
        async with self._client().stream(
            "POST",
            self._stream_url if streaming else self._url,
            content=dumps(exchange.body).encode("utf-8", "replace"),
            headers=self._headers | _call_headers(),
        ) as response:
            as_json = response.headers.get("content-type", "").startswith("application/json")
            if streaming and response.is_success and not as_json:
                return await self._streamed_body(response, exchange, asked_at)
            body = _json(await response.aread())
        if not response.is_success or (isinstance(body, dict) and body.get("error")):
            raise self._refusal(body, response)
        if not isinstance(body, dict):
            raise LLMResponseError(f"{self.provider_name}: the reply is not a JSON object")
        if streaming and (text := reply_from_wire(body, provider=self.provider_name).output_text):
            exchange.measures["ttft_ms"] = (self._clock() - asked_at) * 1000
            await exchange.hand_out(text)
        return body

    async def _streamed_body(
        self, response: httpx.Response, exchange: _Exchange, asked_at: float
    ) -> dict[str, Any]:
        reply, events = StreamedReply(), SSEDecoder()
        chunks = response.aiter_bytes()
        exchange.measures.pop("ttft_ms", None)
        try:
            async for chunk in chunks:
                for data in events.feed(chunk):
                    ...
        except httpx.TransportError:
            if not reply.finished:  # otherwise only the token counts are missing
                raise
        return reply.body()
