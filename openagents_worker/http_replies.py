"""HTTP replies. The only place that reads one: with a size limit, decompressed in pieces, without cookies.

The server controls the length, the compression and the headers of a reply. Therefore this module trusts no
length, encoding or number. Any exception of httpx, h11, zlib or a codec becomes one of three:
`httpx.TransportError` (the connection broke), `ReplyTooLarge` or `ReplyUnreadable`.
"""

from __future__ import annotations

import asyncio
import codecs
import zlib
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import aclosing, contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpx

from openagents_worker.errors import OpenAgentsError

__all__ = [
    "ACCEPT_ENCODING",
    "BoundedClient",
    "ReplyTooLarge",
    "ReplyUnreadable",
    "beginning_of",
    "body_of",
    "no_cookies",
    "pieces_of",
    "text_of_body",
    "translated_errors",
    "with_translated_errors",
]

T = TypeVar("T")

ACCEPT_ENCODING = "gzip, deflate"
"""The compressions that the standard library can decompress in pieces."""

PIECE_BYTES = 64 * 1024  # decompressed at a time: 64 KB of gzip can expand to 64 MB
BYTES_A_PIECE = 256  # the smallest allowed average; an event of a stream has more
LEAST_PIECES = 10_000  # a short reply may have this many pieces, whatever their size
FORMAT_BYTES = 2  # the first bytes show which of the two formats of `deflate` it is
# Reading buffered data never waits, so the reader yields to the event loop after so many pieces or bytes.
YIELD_PIECES = 64
YIELD_BYTES = 64 * 1024  # this can be a thousand events
NOT_TEXT = frozenset({"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "utf-7"})
"""Python codecs that no web page uses. They are slow, or cannot replace invalid bytes."""


class ReplyTooLarge(Exception):
    """A reply, or a part of it, is larger than its limit. The message names the part and the limit in
    bytes."""


class ReplyUnreadable(Exception):
    """A reply is not valid HTTP, has an unsupported compression, or cannot be decompressed."""


def no_cookies() -> CookieJar:
    """A cookie jar that stores nothing: one client serves many runs, which must not share cookies."""
    return CookieJar(policy=DefaultCookiePolicy(allowed_domains=[]))


@contextmanager
def translated_errors() -> Iterator[None]:
    """Any exception but a `TransportError` is translated to `ReplyUnreadable`.

    It catches `Exception`, because httpx passes on errors of h11, ssl, idna and codecs that it does not
    document. Errors of this library, for example for a blocked address, are raised unchanged.
    """
    try:
        yield
    except (httpx.TransportError, OpenAgentsError, ReplyTooLarge, ReplyUnreadable):
        raise
    except OSError as error:  # raised by ssl during a read: httpx does not translate it
        raise httpx.ReadError(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        raise ReplyUnreadable(f"{type(error).__name__}: {error}"[:300]) from error


async def with_translated_errors(reply: Awaitable[T]) -> T:
    """The result of `reply`, with `translated_errors`."""
    with translated_errors():
        return await reply


async def pieces_of(
    response: httpx.Response, *, max_bytes: int, what: str = "the reply"
) -> AsyncGenerator[bytes, None]:
    """The decompressed body in pieces. Raises `ReplyTooLarge` after `max_bytes`, if there is more.

    `what` names the reply in errors. The number of pieces is limited, too, because a body that arrives byte
    by byte costs fifty microseconds a byte.
    """
    if response.is_stream_consumed:  # by a transport without a network, whose reply is complete
        yield response.content
        return
    decode: _Plain | _Inflate | None = None  # made for a body only: a reply to HEAD has the headers of one
    bytes_left, pieces_left = max_bytes, max(max_bytes // BYTES_A_PIECE, LEAST_PIECES)
    pieces_since_yield = bytes_since_yield = 0
    raw_pieces: Any = response.aiter_raw()  # an async generator, but httpx does not declare it as one
    # Around the loop, because a coroutine for each piece takes longer than its decoding.
    async with aclosing(raw_pieces) as stream:
        with translated_errors():
            async for raw in stream:
                pieces_left -= 1
                if pieces_left < 0:
                    raise ReplyTooLarge(f"{what} has too many pieces for a limit of {max_bytes} bytes")
                decode = decode or _decoder(response)
                for piece in decode(raw):
                    if len(piece) > bytes_left:
                        yield piece[:bytes_left]
                        raise ReplyTooLarge(f"{what} has more than {max_bytes} bytes")
                    bytes_left -= len(piece)
                    yield piece
                    pieces_since_yield += 1
                    bytes_since_yield += len(piece)
                    if pieces_since_yield >= YIELD_PIECES or bytes_since_yield >= YIELD_BYTES:
                        pieces_since_yield = bytes_since_yield = 0
                        await asyncio.sleep(0)


async def body_of(response: httpx.Response, *, max_bytes: int) -> bytes:
    """The whole decompressed body. Raises `ReplyTooLarge` if it has more than `max_bytes`."""
    body = bytearray()
    async with aclosing(pieces_of(response, max_bytes=max_bytes)) as pieces:
        async for piece in pieces:
            body += piece
    return bytes(body)


class BoundedClient(httpx.AsyncClient):
    """A client for libraries that read whole replies: one of more than `max_bytes` is a `httpx.ReadError`."""

    def __init__(self, *, max_bytes: int, **options: Any) -> None:
        super().__init__(**options)
        self._max_bytes = max_bytes

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        response = await super().send(request, stream=True, **options)
        try:
            body = await body_of(response, max_bytes=self._max_bytes)
        except (ReplyTooLarge, ReplyUnreadable) as error:
            raise httpx.ReadError(str(error), request=request) from error
        finally:
            await response.aclose()
        headers = [
            (name, value) for name, value in response.headers.multi_items() if name not in _OF_THE_BODY
        ]
        return httpx.Response(
            response.status_code,
            headers=headers,
            content=body,
            request=response.request,
            extensions=response.extensions,
        )


_OF_THE_BODY = frozenset({"content-encoding", "content-length", "transfer-encoding"})


async def beginning_of(response: httpx.Response, *, max_bytes: int) -> tuple[bytes, bool]:
    """The first `max_bytes` of the decompressed body, and whether there is more; the rest is not read."""
    body = bytearray()
    try:
        async with aclosing(pieces_of(response, max_bytes=max_bytes)) as pieces:
            async for piece in pieces:
                body += piece
    except ReplyTooLarge:
        return bytes(body), True
    return bytes(body), False


def text_of_body(body: bytes, content_type: str) -> str:
    """The body as text, decoded with the character set of the content type, or UTF-8 if it is not usable."""
    try:
        parsed = httpx.Response(200, headers={"content-type": content_type})
        charset = parsed.charset_encoding or "utf-8"
        if codecs.lookup(charset).name.replace("_", "-") in NOT_TEXT:
            raise LookupError(charset)
        return body.decode(charset, "replace")
    except (LookupError, ValueError):  # no such codec, or one that does not decode bytes to text
        return body.decode("utf-8", "replace")


# --- decompression ---------------------------------------------------------------------------------------


class _Plain:
    def __call__(self, raw: bytes) -> Iterator[bytes]:
        yield raw


class _Inflate:
    """Decompression with zlib, piece by piece.

    `otherwise` is a second format, as zlib's `wbits`. It is tried if the first bytes are not valid in the
    first one: servers use two formats under the name `deflate`.
    """

    def __init__(self, wbits: int, otherwise: int | None = None) -> None:
        self._zlib = zlib.decompressobj(wbits)
        self._otherwise = otherwise
        self._begin = b""

    def __call__(self, raw: bytes) -> Iterator[bytes]:
        while not self._zlib.eof:
            piece = self._decompress(raw)
            raw = self._zlib.unconsumed_tail
            if piece:
                yield piece
            if not raw and len(piece) < PIECE_BYTES:
                return

    def _decompress(self, raw: bytes) -> bytes:
        try:
            piece = self._zlib.decompress(raw, PIECE_BYTES)
        except zlib.error as error:
            if self._otherwise is None:
                raise ReplyUnreadable(f"the compressed bytes cannot be read: {error}") from error
            self._zlib, self._otherwise = zlib.decompressobj(self._otherwise), None
            return self._decompress(self._begin + raw)
        if self._otherwise is not None:
            self._begin += raw
            self._otherwise = self._otherwise if len(self._begin) < FORMAT_BYTES else None
        return piece


def _decoder(response: httpx.Response) -> _Plain | _Inflate:
    """The decompressor for the `Content-Encoding` of a reply. Raises `ReplyUnreadable`."""
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return _Plain()
    if encoding in ("gzip", "x-gzip"):
        return _Inflate(zlib.MAX_WBITS | 16)
    if encoding == "deflate":
        return _Inflate(zlib.MAX_WBITS, -zlib.MAX_WBITS)
    raise ReplyUnreadable(f"the compression {encoding[:40]!r} is not supported")
