"""Reading a provider's HTTP reply: the only place that distinguishes a stream, a whole body and an error.

The first bytes decide, not the label: servers mislabel both. A reply with status 200 may be an error in the
shape of any provider, a login page, or empty.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from openagents_worker.errors import LLMError
from openagents_worker.http_replies import (
    BYTES_A_PIECE,
    LEAST_PIECES,
    ReplyTooLarge,
    ReplyUnreadable,
    beginning_of,
    pieces_of,
)
from openagents_worker.jsontext import loads
from openagents_worker.llm.api_keys import ApiKeys
from openagents_worker.llm.base import Delta, DeltaKind, LLMUsage, OnDelta, OnPiece
from openagents_worker.llm.codec import Codec, StreamReader
from openagents_worker.llm.failures import error_in, failure, not_a_reply
from openagents_worker.llm.sse import SSEDecoder

__all__ = ["Endpoint", "Exchange", "ReplyReading"]

WHOLE_BODIES = ("application/json", "text/html")  # decides only if the first bytes do not
DRAIN_S = 0.5  # longest wait for the bytes after the end; once they are read, the connection can be reused
DRAIN_BYTES = 64 * 1024  # largest number of these bytes
MAX_ERROR_BYTES = 64 * 1024  # read from the body of an error; the message shows 500 characters of it
STREAM_OVERHEAD = 16  # stream bytes allowed per byte of the reply: each token is wrapped in a JSON object
SSE_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A provider's URLs and headers, and where its key comes from."""

    provider: str
    url: str
    stream_url: str
    headers: dict[str, str] = field(repr=False)
    """The headers of every request, without the key. They go before those with the key."""
    secrets: Sequence[str] = field(repr=False)
    """Strings that no error message may contain, beside the key."""
    keys: ApiKeys
    key_headers: Callable[[str], Mapping[str, str]]
    """The headers with a key."""


@dataclass(slots=True)
class Exchange:
    """One model call with all its tries: the request body, the listeners and the measurements."""

    body: dict[str, Any] = field(repr=False)
    on_delta: OnDelta | None
    on_piece: OnPiece | None = None
    requests: int = 0
    """Requests that failed in this attempt."""
    used_before: list[LLMUsage] = field(default_factory=list)
    """What the failed requests have used, with its cost, if their replies were counted."""
    tokens: int = 0
    """Estimated tokens of a request and its reply, if they are limited."""
    delivered: bool = False
    """Whether a listener has got a piece of the reply."""
    key: str | None = field(default=None, repr=False)
    """The key of the requests."""
    request_headers: Mapping[str, str] | None = field(default=None, repr=False)
    """The headers of every request of the call, with the key. None: the key is not known yet."""
    secrets: Sequence[str] = field(default=(), repr=False)
    """Strings that no error message may contain."""
    parts: list[Mapping[str, Any]] = field(default_factory=list, repr=False)
    """The bodies of the parts of a reply that the provider has paused."""
    is_paused: bool = False
    """Whether the provider has paused its reply, so that the next request continues it."""
    last_part: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The body after these parts, with which the reply is complete."""
    part_costs: list[float | None] = field(default_factory=list)
    """The cost in USD that a gateway states for each of these parts; None if it states none."""
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    """The headers of the newest reply."""
    took_ms: float = 0.0
    """Milliseconds of the newest request, from its begin to the end of its reply."""
    measures: dict[str, Any] = field(default_factory=dict)
    reader: StreamReader | None = None
    """The reader of a stream that broke off, if the next stream continues it. None: the next reply is new."""
    after_chunk: Callable[[StreamReader], Awaitable[None]] | None = None
    """Awaited after each chunk of a streamed reply, before its pieces are delivered."""

    @property
    def is_streamed(self) -> bool:
        return self.on_delta is not None or self.on_piece is not None

    async def deliver(self, pieces: Sequence[Delta], elapsed_ms: Callable[[], float]) -> None:
        """Pass pieces of the reply to their listeners. The first one sets `ttft_ms`."""
        if "ttft_ms" not in self.measures:
            self.measures["ttft_ms"] = round(elapsed_ms(), 3)
        for piece in pieces:
            if not piece.text:
                continue
            if piece.kind is DeltaKind.TEXT:
                if self.on_delta is not None:
                    self.delivered = True
                    await self.on_delta(piece.text)
            elif self.on_piece is not None:
                self.delivered = True
                await self.on_piece(piece)


class ReplyReading:
    """Reads the replies of one provider."""

    def __init__(self, endpoint: Endpoint, codec: Codec, *, max_bytes: int) -> None:
        self._endpoint = endpoint
        self._codec = codec
        self._max_bytes = max_bytes

    async def body_of(
        self, response: httpx.Response, exchange: Exchange, elapsed_ms: Callable[[], float]
    ) -> Any:
        """The body of a reply, as if it were not streamed. Raises the provider's error.

        `elapsed_ms` returns the milliseconds since the request was sent.
        """
        if not response.is_success:
            body, _ = await beginning_of(response, max_bytes=MAX_ERROR_BYTES)
            raise self._failure(_json(body), response, response.status_code, exchange)
        stream = pieces_of(response, max_bytes=self._max_bytes * STREAM_OVERHEAD, what="the stream")
        async with aclosing(stream):
            head = await _beginning(stream)
            if _is_stream(head, response.headers.get("content-type", ""), streaming=exchange.is_streamed):
                return await self._read_stream(head, stream, response, exchange, elapsed_ms)
            body = _json(await self._read_whole_body(head, stream))
        self._check_whole(body, response, exchange)
        is_new = bool(exchange.parts) or not exchange.delivered
        if exchange.is_streamed and is_new:  # the server cannot stream: it sent one complete reply
            text = self._codec.reply(body, provider=self._endpoint.provider).output_text
            await exchange.deliver([Delta(DeltaKind.TEXT, text)], elapsed_ms)
        return body

    async def _read_whole_body(self, head: bytes, stream: AsyncGenerator[bytes]) -> bytes:
        body = bytearray(head)
        pieces_left = max(self._max_bytes // BYTES_A_PIECE, LEAST_PIECES)
        async for piece in stream:
            body += piece
            pieces_left -= 1
            if len(body) > self._max_bytes:
                break
            if pieces_left < 0:
                raise ReplyTooLarge(f"the reply has too many pieces for a limit of {self._max_bytes} bytes")
        if len(body) > self._max_bytes:
            raise ReplyTooLarge(f"the reply has more than {self._max_bytes} bytes")
        return bytes(body)

    def _check_whole(self, body: Any, response: httpx.Response, exchange: Exchange) -> None:
        """Raises the error that the body describes, or `not_a_reply`, unless the body is a reply."""
        if isinstance(body, dict) and self._codec.is_reply(body):
            return
        if (error := error_in(body)) is not None:
            raise self._failure(error, response, None, exchange)
        raise not_a_reply(
            body,
            headers=response.headers,
            provider=self._endpoint.provider,
            secrets=exchange.secrets,
        )

    async def _read_stream(
        self,
        head: bytes,
        stream: AsyncGenerator[bytes],
        response: httpx.Response,
        exchange: Exchange,
        elapsed_ms: Callable[[], float],
    ) -> dict[str, Any]:
        reply = exchange.reader or self._codec.stream(max_chars=self._max_bytes)
        if exchange.reader is not None:
            reply.resume()
        events = SSEDecoder(max_event_chars=self._max_bytes)

        async def add(piece: bytes) -> bool:
            """Add the events of a piece to the reply, and return whether one of them ends the stream."""
            for data in events.feed(piece):
                data = data.strip()
                if data and data == self._codec.end_of_stream:
                    return True
                if data:
                    pieces = reply.add(self._parse_chunk(data, events.event, response, exchange))
                    if exchange.after_chunk is not None:
                        await exchange.after_chunk(reply)
                    if reply.begun:
                        await exchange.deliver(pieces, elapsed_ms)
            return False

        try:
            piece: bytes | None = head
            while piece is not None:
                if await add(piece):
                    await _drain(stream)
                    break
                piece = await anext(stream, None)
        except httpx.TransportError:
            if not reply.finished:  # after the finish reason, only the token counts can be missing
                raise
        if not reply.finished:
            raise httpx.RemoteProtocolError("the stream ended before its finish_reason")
        return reply.body()

    def _parse_chunk(
        self, data: str, event: str, response: httpx.Response, exchange: Exchange
    ) -> dict[str, Any]:
        """Parse the data of one event. Raises the error that it reports."""
        chunk = _json(data)
        error = chunk if event == "error" else error_in(chunk)
        if error is not None or not isinstance(chunk, dict):
            raise self._failure(chunk if error is None else error, response, None, exchange)
        return chunk

    def _failure(
        self, body: Any, response: httpx.Response, status: int | None, exchange: Exchange
    ) -> LLMError:
        return failure(
            body,
            status=status,
            headers=response.headers,
            provider=self._endpoint.provider,
            key_origin=self._endpoint.keys.origin,
            secrets=exchange.secrets,
        )


async def _beginning(stream: AsyncGenerator[bytes]) -> bytes:
    """The first pieces, until there are enough bytes to know what follows."""
    head = b""
    async for piece in stream:
        head += piece
        begin = _without_leading_space(head)
        if begin and (begin[:1] in b"{[<:" or len(begin) >= max(map(len, SSE_FIELDS))):
            break
        if len(head) > DRAIN_BYTES:  # nothing but white space
            break
    return head


def _without_leading_space(head: bytes) -> bytes:
    return head.removeprefix(BOM).lstrip()


def _is_stream(head: bytes, content_type: str, *, streaming: bool) -> bool:
    """Whether the bytes begin a stream of events."""
    begin = _without_leading_space(head)
    if begin[:1] and begin[:1] in b"{[<":
        return False
    if begin.startswith(SSE_FIELDS):
        return True
    return streaming and bool(head) and not content_type.startswith(WHOLE_BODIES)


def _json(data: bytes | str) -> Any:
    """The parsed JSON value, or the text if it is not JSON."""
    try:
        return loads(data.removeprefix(BOM) if isinstance(data, bytes) else data, nan_is_null=True)
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
