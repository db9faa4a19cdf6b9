"""Replies over HTTP. The only place that reads one: bounded, decompressed piece by piece, without cookies.

Whoever answers decides how much comes, how it is compressed and what its headers say. So nothing here trusts
a length, an encoding or a number, and everything that httpx, h11, zlib or a codec raises for such a reply
becomes one of three: `httpx.TransportError` (the connection broke), `ReplyTooLarge` or `ReplyUnreadable`.
"""

from __future__ import annotations

import asyncio
import codecs
import zlib
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import aclosing
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar

import httpx

from openagents_worker.errors import OpenAgentsError

__all__ = [
    "ACCEPT_ENCODING",
    "ReplyTooLarge",
    "ReplyUnreadable",
    "beginning_of",
    "body_of",
    "no_cookies",
    "pieces_of",
    "received",
    "text_of_body",
]

T = TypeVar("T")

ACCEPT_ENCODING = "gzip, deflate"
"""What can be decompressed a piece at a time, with the standard library."""

PIECE_BYTES = 64 * 1024  # decompressed at once: 64 KB of gzip can stand for 64 MB
BYTES_A_PIECE = 256  # on average, at least: an event of a stream has more
LEAST_PIECES = 10_000  # of a short reply
FORMAT_BYTES = 2  # tell the one format of `deflate` from the other
BREATH_PIECES = 64  # a reply of tiny pieces is read from memory: other runs have their turn after so many
BREATH_BYTES = 64 * 1024  # and after so much of a large one: that can be a thousand events
NOT_TEXT = frozenset({"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "utf-7"})
"""Codecs of Python that are not the character set of any page: slow, or unable to replace what is wrong."""


class ReplyTooLarge(Exception):
    """A reply, or one part of it, is larger than its limit; the message names the part and the bytes."""


class ReplyUnreadable(Exception):
    """A reply is not HTTP, is compressed in a way that was not asked for, or its bytes do not decompress."""


def no_cookies() -> CookieJar:
    """A jar that keeps nothing: one client serves many runs, and a cookie of one must not reach another."""
    return CookieJar(policy=DefaultCookiePolicy(allowed_domains=[]))


async def received(reply: Awaitable[T]) -> T:
    """What `reply` gives. Whatever else than a `TransportError` is raised for it is a `ReplyUnreadable`.

    It is caught by the base class: httpx hands through errors of h11, ssl, idna and the codecs that it does
    not list. Our own errors of a transport (an address that is refused) travel on.
    """
    try:
        return await reply
    except (httpx.TransportError, OpenAgentsError, ReplyTooLarge, ReplyUnreadable):
        raise
    except OSError as error:  # of ssl, while it reads: httpx does not translate it
        raise httpx.ReadError(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        raise ReplyUnreadable(f"{type(error).__name__}: {error}"[:300]) from error


async def pieces_of(
    response: httpx.Response, *, max_bytes: int, what: str = "the reply"
) -> AsyncGenerator[bytes, None]:
    """The body, decompressed: at most `max_bytes` of it, and then `ReplyTooLarge` if there is more.

    It may come in as many pieces as it has bytes for: one byte at a time costs fifty microseconds a byte.
    """
    if response.is_stream_consumed:  # by a transport without a network, which made the reply whole
        yield response.content
        return
    decode = _decoder(response)
    left, pieces_left, since_breath, pieces = max_bytes, max(max_bytes // BYTES_A_PIECE, LEAST_PIECES), 0, 0
    raw_pieces: Any = response.aiter_raw()  # a generator, though httpx does not say so
    async with aclosing(raw_pieces) as stream:
        while (raw := await received(_next(stream))) is not None:
            pieces_left -= 1
            if pieces_left < 0:
                raise ReplyTooLarge(f"{what} comes in too many pieces for its {max_bytes} bytes")
            for piece in decode(raw):
                if len(piece) > left:
                    yield piece[:left]
                    raise ReplyTooLarge(f"{what} has more than {max_bytes} bytes")
                left -= len(piece)
                yield piece
                pieces, since_breath = pieces + 1, since_breath + len(piece)
                if pieces >= BREATH_PIECES or since_breath >= BREATH_BYTES:
                    pieces = since_breath = 0
                    await asyncio.sleep(0)


async def body_of(response: httpx.Response, *, max_bytes: int) -> bytes:
    """The whole body. Raises `ReplyTooLarge` when it has more than `max_bytes`, decompressed."""
    body = bytearray()
    async with aclosing(pieces_of(response, max_bytes=max_bytes)) as pieces:
        async for piece in pieces:
            body += piece
    return bytes(body)


async def beginning_of(response: httpx.Response, *, max_bytes: int) -> tuple[bytes, bool]:
    """The body as far as its limit, and whether it was cut off there; the rest is not read."""
    body = bytearray()
    try:
        async with aclosing(pieces_of(response, max_bytes=max_bytes)) as pieces:
            async for piece in pieces:
                body += piece
    except ReplyTooLarge:
        return bytes(body), True
    return bytes(body), False


def text_of_body(body: bytes, content_type: str) -> str:
    """The body as text: in the character set that its header names if that is one, else in UTF-8."""
    try:
        named = httpx.Response(200, headers={"content-type": content_type})
        charset = named.charset_encoding or "utf-8"
        if codecs.lookup(charset).name.replace("_", "-") in NOT_TEXT:
            raise LookupError(charset)
        return body.decode(charset, "replace")
    except (LookupError, ValueError):  # no such codec, or one that does not make text of bytes
        return body.decode("utf-8", "replace")


# --- how it comes ----------------------------------------------------------------------------------------


async def _next(stream: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(stream, None)


class _Plain:
    def __call__(self, raw: bytes) -> Iterator[bytes]:
        yield raw


class _Inflate:
    """zlib, a piece at a time. `deflate` means two formats, of which the first bytes tell."""

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
                raise ReplyUnreadable(f"its compressed bytes cannot be read: {error}") from error
            self._zlib, self._otherwise = zlib.decompressobj(self._otherwise), None
            return self._decompress(self._begin + raw)
        if self._otherwise is not None:
            self._begin += raw
            self._otherwise = self._otherwise if len(self._begin) < FORMAT_BYTES else None
        return piece


def _decoder(response: httpx.Response) -> _Plain | _Inflate:
    named = response.headers.get("content-encoding", "").strip().lower()
    if named in ("", "identity"):
        return _Plain()
    if named in ("gzip", "x-gzip"):
        return _Inflate(zlib.MAX_WBITS | 16)
    if named == "deflate":
        return _Inflate(zlib.MAX_WBITS, -zlib.MAX_WBITS)
    raise ReplyUnreadable(f"it is compressed as {named[:40]!r}, which was not asked for")
