"""Models over HTTP: the only place that sends a request to a provider, and that tries again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import httpx

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMConnectionError, LLMError, LLMReplyTooLarge, LLMResponseError
from openagents_worker.http_replies import (
    ACCEPT_ENCODING,
    ReplyTooLarge,
    ReplyUnreadable,
    beginning_of,
    body_of,
    no_cookies,
    pieces_of,
    received,
)
from openagents_worker.jsontext import dumps, loads
from openagents_worker.llm.base import (
    LLMResponse,
    LLMUsage,
    Message,
    ModelClient,
    ModelRequest,
    OnDelta,
    current_call,
)
from openagents_worker.llm.connection_pool import ConnectionPool
from openagents_worker.llm.failures import failure, presentable
from openagents_worker.llm.pricing import estimate_tokens, estimate_usage, price
from openagents_worker.llm.retry import pause_ms, tell_retry
from openagents_worker.llm.sse import SSEDecoder
from openagents_worker.models import header_text

__all__ = ["Codec", "Endpoint", "HttpModelClient", "StreamReader", "Timing"]

WHOLE_BODIES = ("application/json", "text/html")  # anything else is tried as a stream: not all label it well
DRAIN_S = 0.5  # how long the last bytes after [DONE] are waited for, to keep the connection
DRAIN_BYTES = 64 * 1024  # and how many of them are read
MAX_ERROR_BYTES = 64 * 1024  # of the body of a reply that is not a success; a message shows 500 characters
STREAM_OVERHEAD = 16  # the bytes of a whole stream to those of its reply: each token comes in JSON of its own


@dataclass(frozen=True, slots=True)
class Timing:
    """How time passes, and what chance decides, for the pauses between tries. Times are in seconds."""

    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic


class StreamReader(Protocol):
    """Puts the chunks of one streamed reply together."""

    @property
    def begun(self) -> bool:
        """Whether the model has said anything yet."""

    @property
    def finished(self) -> bool:
        """Whether the model said that it is done; without that the reply is a torn one."""

    def add(self, chunk: Mapping[str, Any]) -> str:
        """Take in one chunk; returns its piece of text. Raises `LLMResponseError`, `ReplyTooLarge`."""

    def body(self) -> dict[str, Any]:
        """The reply so far, as the body of a plain request's reply."""


class Codec(Protocol):
    """A provider's API as JSON: what is sent and what comes back. It opens nothing and keeps nothing."""

    @property
    def end_of_stream(self) -> str:
        """The data of the event after which no chunk comes."""

    def body(self, request: ModelRequest, model: str) -> dict[str, Any]:
        """The body of the request to this model."""

    def reply(self, body: Any, *, provider: str) -> LLMResponse:
        """The reply from a whole body. Raises `LLMResponseError` where the body is not a reply."""

    def stream(self, *, max_chars: int) -> StreamReader:
        """What reads the chunks of one streamed reply. It raises `ReplyTooLarge` after `max_chars`."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a provider is asked, and as whom."""

    provider: str
    url: str
    stream_url: str
    headers: dict[str, str]
    secrets: Sequence[str]
    """What no message may show."""
    key_env: str
    """The environment variable that the key was read from, for the hint of an error."""


class HttpModelClient(ModelClient):
    """A model behind a POST request. The codec says what requests and replies look like.

    Streams when somebody listens (`on_delta`). A failed request is repeated here as `options.retry` says,
    a streamed one only until the first piece of text has been handed out. Raises `LLMRateLimitError` (429,
    or a server error that names the time to come back), `LLMConnectionError` (transport, 408, 5xx, a torn
    stream), `LLMReplyTooLarge` (more than `options.max_reply_bytes`) or `LLMResponseError` (everything else,
    with the provider's own message). The key never shows.
    """

    def __init__(
        self,
        model: str,
        options: LLMOptions,
        *,
        endpoint: Endpoint,
        codec: Codec,
        http: httpx.AsyncClient | None = None,
        timing: Timing | None = None,
    ) -> None:
        """`model` is asked where a request names none. A given `http` stays the caller's."""
        self.provider_name = endpoint.provider
        self.model_id = model
        self.url, self.stream_url = endpoint.url, endpoint.stream_url
        self._options = options
        self._endpoint = endpoint
        self._codec = codec
        self._http, self._owns_http = http, http is None
        self._opening = asyncio.Lock()
        self._timing = timing or Timing()

    async def respond(self, request: ModelRequest) -> LLMResponse:
        model = request.model or self.model_id
        exchange = _HttpExchange(self._codec.body(request, model), request.on_delta)
        reply = await self._ask_in_time(exchange)
        usage = reply.usage or _estimated(request.messages, reply)
        usage = replace(usage, metadata={**usage.metadata, **exchange.measures})
        return replace(reply, usage=price(model, usage, self._options.pricing))

    def count_tokens(self, text: str) -> int:
        return estimate_tokens(text)

    async def aclose(self) -> None:
        """Close the connections that this client opened."""
        if self._owns_http and self._http is not None:
            http, self._http = self._http, None
            self._opening = asyncio.Lock()  # the next to open may be on another loop
            await http.aclose()

    # --- tries -------------------------------------------------------------------------------------------

    async def _ask_in_time(self, exchange: _HttpExchange) -> LLMResponse:
        """The reply, unless the whole call takes too long; a `TimeoutError` of the listener travels on."""
        limit_ms = self._options.whole_call_ms
        deadline = asyncio.timeout(limit_ms / 1000)
        try:
            async with deadline:
                return await self._ask(exchange)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise LLMConnectionError(
                f"{self.provider_name}: no whole reply within {limit_ms} ms",
                hint="llm.total_timeout_ms is the limit of a call; llm.timeout_ms that of a silence",
            ) from error

    async def _ask(self, exchange: _HttpExchange) -> LLMResponse:
        started, failed_tries = self._timing.clock(), 0
        while True:
            try:
                reply = await self._try(exchange)
            except LLMError as error:
                failed_tries += 1
                pause = self._pause_ms(error, exchange, failed_tries, (self._timing.clock() - started) * 1000)
                if pause is None:
                    raise
                tell_retry(error, model=exchange.body["model"], delay_ms=pause, attempt=failed_tries)
                await self._timing.sleep(pause / 1000)
            else:
                exchange.measures["retries"] = failed_tries
                return reply

    def _pause_ms(
        self, error: LLMError, exchange: _HttpExchange, tries: int, spent_ms: float
    ) -> float | None:
        retry = self._options.retry
        lost_connection = isinstance(error.__cause__, httpx.TransportError)
        if exchange.handed_out or (lost_connection and not retry.retry_on_connection_errors):
            return None
        return pause_ms(retry, error, tries=tries, spent_ms=spent_ms, random=self._timing.random)

    async def _try(self, exchange: _HttpExchange) -> LLMResponse:
        try:
            return self._codec.reply(await self._body(exchange), provider=self.provider_name)
        except httpx.TransportError as error:
            problem = f"no whole reply from {httpx.URL(self.url).host} ({type(error).__name__}: {error})"
            raise LLMConnectionError(
                presentable(f"{self.provider_name}: {problem}", self._endpoint.secrets),
                hint="check llm.api_base, and llm.timeout_ms if the model is slow",
            ) from error
        except ReplyTooLarge as error:
            raise LLMReplyTooLarge(
                f"{self.provider_name}: {error}",
                hint="llm.max_reply_bytes is the limit of a reply, after decompression",
            ) from error
        except ReplyUnreadable as error:
            text = f"{self.provider_name}: the reply cannot be read: {error}"
            raise LLMResponseError(presentable(text, self._endpoint.secrets)) from error

    async def _body(self, exchange: _HttpExchange) -> Any:
        """Send the request once; the body of its reply, however it came."""
        exchange.measures.clear()
        streaming = exchange.on_delta is not None
        asked_at = self._timing.clock()
        http = await self._client()
        request = http.build_request(
            "POST",
            self.stream_url if streaming else self.url,
            content=dumps(exchange.body).encode("utf-8", "replace"),  # half a character cannot be sent
            headers={"accept-encoding": ACCEPT_ENCODING} | self._endpoint.headers | _call_headers(),
        )
        response = await received(http.send(request, stream=True))
        try:
            is_whole = response.headers.get("content-type", "").startswith(WHOLE_BODIES)
            if streaming and response.is_success and not is_whole:
                return await self._streamed_body(response, exchange, asked_at)
            body = _json(await self._whole_body(response))
        finally:
            await response.aclose()
        if not response.is_success or (isinstance(body, dict) and body.get("error")):
            raise self._failure(body, response, None if response.is_success else response.status_code)
        if streaming:  # a server that cannot stream answers at once
            text = self._codec.reply(body, provider=self.provider_name).output_text
            await exchange.hand_out(text, (self._timing.clock() - asked_at) * 1000)
        return body

    async def _whole_body(self, response: httpx.Response) -> bytes:
        if response.is_success:
            return await body_of(response, max_bytes=self._options.max_reply_bytes)
        body, _ = await beginning_of(response, max_bytes=MAX_ERROR_BYTES)
        return body

    async def _streamed_body(
        self, response: httpx.Response, exchange: _HttpExchange, asked_at: float
    ) -> dict[str, Any]:
        reply = self._codec.stream(max_chars=self._options.max_reply_bytes)
        try:
            async with aclosing(self._chunks(response)) as chunks:
                async for chunk in chunks:
                    piece = reply.add(chunk)
                    if reply.begun:
                        await exchange.hand_out(piece, (self._timing.clock() - asked_at) * 1000)
        except httpx.TransportError:
            if not reply.finished:  # otherwise nothing but the token counts is missing
                raise
        if not reply.finished:
            raise httpx.RemoteProtocolError("the stream ended before its finish_reason")
        return reply.body()

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
        limit = self._options.max_reply_bytes
        events = SSEDecoder(max_event_chars=limit)
        stream = pieces_of(response, max_bytes=limit * STREAM_OVERHEAD, what="the stream")
        async with aclosing(stream):
            async for piece in stream:
                for data in events.feed(piece):
                    if data.strip() == self._codec.end_of_stream:
                        await _drain(stream)
                        return
                    yield self._chunk(data, response)

    def _chunk(self, data: str, response: httpx.Response) -> dict[str, Any]:
        chunk = _json(data)
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise self._failure(chunk, response, None)
        return chunk

    def _failure(self, body: Any, response: httpx.Response, status: int | None) -> LLMError:
        return failure(
            body,
            status=status,
            headers=response.headers,
            provider=self.provider_name,
            key_env=self._endpoint.key_env,
            secrets=self._endpoint.secrets,
        )

    # --- the connection ----------------------------------------------------------------------------------

    async def _client(self) -> httpx.AsyncClient:
        """Made at the first call. Its connections are those of the loop that runs, whichever that is."""
        if self._http is not None:
            return self._http
        async with self._opening:
            if self._http is None:
                options = self._options
                timeout = httpx.Timeout(options.timeout_ms / 1000, connect=options.connect_timeout_ms / 1000)
                # In a thread: reading the certificates takes a tenth of a second, too long for the loop.
                lanes = await asyncio.to_thread(ConnectionPool, self.url)
                self._http = httpx.AsyncClient(transport=lanes, timeout=timeout, cookies=no_cookies())
            return self._http


@dataclass(slots=True)
class _HttpExchange:
    """One call over all its tries: what is asked, who listens, what was measured."""

    body: dict[str, Any]
    on_delta: OnDelta | None
    handed_out: bool = False
    measures: dict[str, Any] = field(default_factory=dict)

    async def hand_out(self, text: str, ttft_ms: float) -> None:
        """Give a piece of text to the listener; the first piece, also one without text, ends the wait."""
        self.measures.setdefault("ttft_ms", round(ttft_ms, 3))
        if text and self.on_delta is not None:
            self.handed_out = True
            await self.on_delta(text)


def _estimated(messages: Sequence[Message], reply: LLMResponse) -> LLMUsage:
    """For servers that do not count tokens; a budget on a guess is better than none."""
    said = reply.output_text + "".join(dumps(dict(call.arguments)) for call in reply.tool_calls)
    return replace(estimate_usage(messages, said), metadata={"estimated": True})


def _json(data: bytes | str) -> Any:
    """The JSON value, or the text itself where it is none."""
    try:
        return loads(data, nan_is_null=True)
    except ValueError:
        return data.decode("utf-8", "replace") if isinstance(data, bytes) else data


async def _drain(stream: AsyncGenerator[bytes]) -> None:
    """Read what follows the last event, so that the connection can be used again; it is closed otherwise."""
    drained = 0
    with suppress(TimeoutError, httpx.TransportError, ReplyTooLarge, ReplyUnreadable):
        async with asyncio.timeout(DRAIN_S):
            async for piece in stream:
                drained += len(piece)
                if drained > DRAIN_BYTES:
                    return


def _call_headers() -> dict[str, str]:
    """What lets a server, or whoever reads its log, recognise a repeated call."""
    info = current_call.get()
    if info is None:
        return {}
    return {
        "Idempotency-Key": header_text(info.idempotency_key),
        "X-Call": header_text(info.call_id),
    }
