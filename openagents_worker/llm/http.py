"""Model clients over HTTP: the only place that sends requests to a provider, and retries them."""

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
    with_translated_errors,
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
from openagents_worker.llm.retry import emit_retry, pause_ms
from openagents_worker.llm.sse import SSEDecoder
from openagents_worker.models import header_text

__all__ = ["Codec", "Endpoint", "HttpModelClient", "StreamReader", "Timing"]

WHOLE_BODIES = ("application/json", "text/html")  # others are read as a stream: some servers mislabel it
DRAIN_S = 0.5  # longest wait for the bytes after [DONE]; once they are read, the connection can be reused
DRAIN_BYTES = 64 * 1024  # largest number of these bytes
MAX_ERROR_BYTES = 64 * 1024  # read from the body of an error; the message shows 500 characters of it
STREAM_OVERHEAD = 16  # stream bytes allowed per byte of the reply: each token is wrapped in a JSON object


@dataclass(frozen=True, slots=True)
class Timing:
    """The clock and the randomness of the pauses between tries; tests replace them. Times are in seconds."""

    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic


class StreamReader(Protocol):
    """Assembles the chunks of one streamed reply."""

    @property
    def begun(self) -> bool:
        """Whether any text or tool call has arrived."""

    @property
    def finished(self) -> bool:
        """Whether the finish reason has arrived. A stream that ends before it is incomplete."""

    def add(self, chunk: Mapping[str, Any]) -> str:
        """Add one chunk and return its text. Raises `LLMResponseError` and `ReplyTooLarge`."""

    def body(self) -> dict[str, Any]:
        """The reply so far, in the shape of a reply that is not streamed."""


class Codec(Protocol):
    """A provider's JSON format: builds request bodies and reads reply bodies. It does no I/O."""

    @property
    def end_of_stream(self) -> str:
        """The data of the event that ends the stream."""

    def body(self, request: ModelRequest, model: str) -> dict[str, Any]:
        """The body of the request, for this model."""

    def reply(self, body: Any, *, provider: str) -> LLMResponse:
        """Parse a complete body. Raises `LLMResponseError` if it is not a reply."""

    def stream(self, *, max_chars: int) -> StreamReader:
        """A reader for one streamed reply. It raises `ReplyTooLarge` after `max_chars` characters."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A provider's URLs, headers and credentials."""

    provider: str
    url: str
    stream_url: str
    headers: dict[str, str]
    secrets: Sequence[str]
    """Strings that no error message may contain."""
    key_env: str
    """The environment variable that holds the key; error hints name it."""


class HttpModelClient(ModelClient):
    """A model that is called by an HTTP POST request. The codec defines the JSON of requests and replies.

    The reply is streamed if the request has `on_delta`. A failed request is retried according to
    `options.retry`; a streamed one only until the first text was delivered. Raises `LLMRateLimitError` (429,
    or a server error with Retry-After), `LLMConnectionError` (transport error, 408, 5xx, incomplete stream),
    `LLMReplyTooLarge` (more than `options.max_reply_bytes`) or `LLMResponseError` (everything else, with the
    provider's message). No error contains the key.
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
        """`model` is the default for requests without a model. The caller closes an `http` that it passes."""
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
        reply = await self._respond_before_deadline(exchange)
        usage = reply.usage or _estimated_usage(request.messages, reply)
        usage = replace(usage, metadata={**usage.metadata, **exchange.measures})
        return replace(reply, usage=price(model, usage, self._options.pricing))

    def count_tokens(self, text: str) -> int:
        return estimate_tokens(text)

    async def aclose(self) -> None:
        """Close the connections that this client opened."""
        if self._owns_http and self._http is not None:
            http, self._http = self._http, None
            self._opening = asyncio.Lock()  # the next request may run on another event loop
            await http.aclose()

    # --- tries -------------------------------------------------------------------------------------------

    async def _respond_before_deadline(self, exchange: _HttpExchange) -> LLMResponse:
        """The reply, within `options.whole_call_ms`. A `TimeoutError` from `on_delta` is raised unchanged."""
        limit_ms = self._options.whole_call_ms
        deadline = asyncio.timeout(limit_ms / 1000)
        try:
            async with deadline:
                return await self._respond_with_retries(exchange)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise LLMConnectionError(
                f"{self.provider_name}: no complete reply within {limit_ms} ms",
                hint="llm.total_timeout_ms limits the whole call; llm.timeout_ms limits the wait for data",
            ) from error

    async def _respond_with_retries(self, exchange: _HttpExchange) -> LLMResponse:
        started, failed_tries = self._timing.clock(), 0
        while True:
            try:
                reply = await self._send_once(exchange)
            except LLMError as error:
                failed_tries += 1
                spent_ms = (self._timing.clock() - started) * 1000
                pause = self._retry_pause_ms(error, exchange, failed_tries, spent_ms)
                if pause is None:
                    raise
                emit_retry(error, model=exchange.body["model"], delay_ms=pause, attempt=failed_tries)
                await self._timing.sleep(pause / 1000)
            else:
                exchange.measures["retries"] = failed_tries
                return reply

    def _retry_pause_ms(
        self, error: LLMError, exchange: _HttpExchange, tries: int, spent_ms: float
    ) -> float | None:
        """Milliseconds before the next try. None: no retry, for example because text was delivered."""
        retry = self._options.retry
        lost_connection = isinstance(error.__cause__, httpx.TransportError)
        if exchange.text_delivered or (lost_connection and not retry.retry_on_connection_errors):
            return None
        return pause_ms(retry, error, tries=tries, spent_ms=spent_ms, random=self._timing.random)

    async def _send_once(self, exchange: _HttpExchange) -> LLMResponse:
        """One try. Errors of httpx and of the reply's size and format become errors of this library."""
        try:
            return self._codec.reply(await self._reply_body(exchange), provider=self.provider_name)
        except httpx.TransportError as error:
            problem = f"no complete reply from {httpx.URL(self.url).host} ({type(error).__name__}: {error})"
            raise LLMConnectionError(
                presentable(f"{self.provider_name}: {problem}", self._endpoint.secrets),
                hint="check llm.api_base, and llm.timeout_ms if the model is slow",
            ) from error
        except ReplyTooLarge as error:
            raise LLMReplyTooLarge(
                f"{self.provider_name}: {error}",
                hint="llm.max_reply_bytes limits the size of a reply, after decompression",
            ) from error
        except ReplyUnreadable as error:
            text = f"{self.provider_name}: the reply cannot be read: {error}"
            raise LLMResponseError(presentable(text, self._endpoint.secrets)) from error

    async def _reply_body(self, exchange: _HttpExchange) -> Any:
        """Send the request once, and return the body of the reply, streamed or not."""
        exchange.measures.clear()
        streaming = exchange.on_delta is not None
        sent_at = self._timing.clock()
        http = await self._client()
        request = http.build_request(
            "POST",
            self.stream_url if streaming else self.url,
            content=dumps(exchange.body).encode("utf-8", "replace"),  # lone surrogates cannot be encoded
            headers={"accept-encoding": ACCEPT_ENCODING} | self._endpoint.headers | _call_headers(),
        )
        response = await with_translated_errors(http.send(request, stream=True))
        try:
            is_whole = response.headers.get("content-type", "").startswith(WHOLE_BODIES)
            if streaming and response.is_success and not is_whole:
                return await self._streamed_body(response, exchange, sent_at)
            body = _json(await self._whole_body(response))
        finally:
            await response.aclose()
        if not response.is_success or (isinstance(body, dict) and body.get("error")):
            raise self._failure(body, response, None if response.is_success else response.status_code)
        if streaming:  # the server cannot stream: it sent one complete reply
            text = self._codec.reply(body, provider=self.provider_name).output_text
            await exchange.deliver(text, (self._timing.clock() - sent_at) * 1000)
        return body

    async def _whole_body(self, response: httpx.Response) -> bytes:
        if response.is_success:
            return await body_of(response, max_bytes=self._options.max_reply_bytes)
        body, _ = await beginning_of(response, max_bytes=MAX_ERROR_BYTES)
        return body

    async def _streamed_body(
        self, response: httpx.Response, exchange: _HttpExchange, sent_at: float
    ) -> dict[str, Any]:
        reply = self._codec.stream(max_chars=self._options.max_reply_bytes)
        try:
            async with aclosing(self._chunks(response)) as chunks:
                async for chunk in chunks:
                    piece = reply.add(chunk)
                    if reply.begun:
                        await exchange.deliver(piece, (self._timing.clock() - sent_at) * 1000)
        except httpx.TransportError:
            if not reply.finished:  # after the finish reason, only the token counts can be missing
                raise
        if not reply.finished:
            raise httpx.RemoteProtocolError("the stream ended before its finish_reason")
        return reply.body()

    async def _chunks(self, response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a stream as JSON objects, until the event that ends it."""
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
        """The HTTP client, created at the first call. Each event loop has connections of its own in it."""
        if self._http is not None:
            return self._http
        async with self._opening:
            if self._http is None:
                options = self._options
                timeout = httpx.Timeout(options.timeout_ms / 1000, connect=options.connect_timeout_ms / 1000)
                # In a thread: reading the certificates takes 0.1 s, which would block the event loop.
                pool = await asyncio.to_thread(ConnectionPool, self.url)
                self._http = httpx.AsyncClient(transport=pool, timeout=timeout, cookies=no_cookies())
            return self._http


@dataclass(slots=True)
class _HttpExchange:
    """One model call with all its tries: the request body, the listener and the measurements."""

    body: dict[str, Any]
    on_delta: OnDelta | None
    text_delivered: bool = False
    measures: dict[str, Any] = field(default_factory=dict)

    async def deliver(self, text: str, ttft_ms: float) -> None:
        """Pass a piece of text to `on_delta`. The first piece, even an empty one, sets `ttft_ms`."""
        self.measures.setdefault("ttft_ms", round(ttft_ms, 3))
        if text and self.on_delta is not None:
            self.text_delivered = True
            await self.on_delta(text)


def _estimated_usage(messages: Sequence[Message], reply: LLMResponse) -> LLMUsage:
    """The usage for a server that does not count tokens: a budget with estimates is better than none."""
    reply_text = reply.output_text + "".join(dumps(dict(call.arguments)) for call in reply.tool_calls)
    return replace(estimate_usage(messages, reply_text), metadata={"estimated": True})


def _json(data: bytes | str) -> Any:
    """The parsed JSON value, or the text if it is not JSON."""
    try:
        return loads(data, nan_is_null=True)
    except ValueError:
        return data.decode("utf-8", "replace") if isinstance(data, bytes) else data


async def _drain(stream: AsyncGenerator[bytes]) -> None:
    """Read the bytes after the last event, so that the connection can be reused. Otherwise it is closed."""
    drained = 0
    with suppress(TimeoutError, httpx.TransportError, ReplyTooLarge, ReplyUnreadable):
        async with asyncio.timeout(DRAIN_S):
            async for piece in stream:
                drained += len(piece)
                if drained > DRAIN_BYTES:
                    return


def _call_headers() -> dict[str, str]:
    """The headers by which a server, or a person who reads its log, recognises a repeated call."""
    info = current_call.get()
    if info is None:
        return {}
    return {
        "Idempotency-Key": header_text(info.idempotency_key),
        "X-Call": header_text(info.call_id),
    }
