"""What is read of a reply over HTTP, however it is compressed, cut up or labelled."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.errors import PermanentToolError
from openagents_worker.http_replies import (
    PIECE_BYTES,
    BoundedClient,
    ReplyTooLarge,
    ReplyUnreadable,
    beginning_of,
    body_of,
    pieces_of,
    text_of_body,
    with_translated_errors,
)
from openagents_worker.retry_after import MAX_RETRY_AFTER_MS, retry_after_ms

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
MB = 1024 * 1024


def _raw_deflate(data: bytes) -> bytes:
    made = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return made.compress(data) + made.flush()


ENCODERS = {
    "": bytes,
    "identity": bytes,
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "Deflate": _raw_deflate,
}


class _Cut(httpx.AsyncByteStream):
    def __init__(self, data: bytes, size: int, error: Exception | None = None) -> None:
        self._data, self._size, self._error = data, size, error
        self.given = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for at in range(0, len(self._data), self._size):
            self.given += 1
            yield self._data[at : at + self._size]
        if self._error is not None:
            raise self._error


def _response(data: bytes, encoding: str = "", size: int = PIECE_BYTES) -> httpx.Response:
    headers = {"content-encoding": encoding} if encoding else {}
    return httpx.Response(200, headers=headers, stream=_Cut(data, size))


@pytest.mark.parametrize("encoding", ENCODERS)
@given(data=st.binary(max_size=300), size=st.integers(1, 40), repeat=st.sampled_from([1, 700]))
async def test_a_body_is_what_was_compressed(encoding: str, data: bytes, size: int, repeat: int) -> None:
    """Whatever the encoding and wherever the network cuts it."""
    body = data * repeat

    response = _response(ENCODERS[encoding](body), encoding, size * (1 + len(body) // 5000))

    assert await body_of(response, max_bytes=len(body) + 1) == body


@pytest.mark.parametrize("encoding", ENCODERS)
async def test_a_body_may_have_its_limit_and_not_a_byte_more(encoding: str) -> None:
    """The limit counts decompressed bytes."""
    packed = ENCODERS[encoding](b"x" * MB)

    assert len(await body_of(_response(packed, encoding), max_bytes=MB)) == MB
    with pytest.raises(ReplyTooLarge, match="more than 1048575 bytes"):
        await body_of(_response(packed, encoding), max_bytes=MB - 1)
    assert await beginning_of(_response(packed, encoding), max_bytes=MB - 1) == (b"x" * (MB - 1), True)
    assert await beginning_of(_response(packed, encoding), max_bytes=MB) == (b"x" * MB, False)


@pytest.mark.parametrize("encoding", ["", "gzip"])
async def test_a_client_for_other_libraries_reads_whole_replies_within_a_limit(encoding: str) -> None:
    """The library sees a reply that is not compressed, with its other headers."""
    packed = ENCODERS[encoding](b"x" * MB)

    def replied(_: httpx.Request) -> httpx.Response:
        headers = [("set-cookie", "a=1"), ("set-cookie", "b=2"), ("content-length", str(len(packed)))]
        headers += [("content-encoding", encoding)] if encoding else []
        return httpx.Response(201, headers=headers, stream=_Cut(packed, PIECE_BYTES))

    for most, whole in ((MB, True), (MB - 1, False)):
        async with BoundedClient(max_bytes=most, transport=httpx.MockTransport(replied)) as client:
            if whole:
                reply = await client.get("http://zep.example/a")
                assert (reply.status_code, len(reply.content)) == (201, MB)
                assert reply.headers.get_list("set-cookie") == ["a=1", "b=2"]
                assert reply.request.url.path == "/a"
            else:
                with pytest.raises(httpx.ReadError, match="more than 1048575 bytes"):
                    await client.get("http://zep.example/a")


async def test_what_is_beyond_the_limit_is_neither_decompressed_nor_read() -> None:
    """No piece is larger than one piece, and the stream is left where the limit was passed."""
    packed = gzip.compress(b"\0" * (16 * MB))
    response, sizes = _response(packed, "gzip", size=256), []

    async def read() -> None:
        async with aclosing(pieces_of(response, max_bytes=MB)) as pieces:
            async for piece in pieces:
                sizes.append(len(piece))

    with pytest.raises(ReplyTooLarge):
        await read()

    assert max(sizes) <= PIECE_BYTES
    assert sum(sizes) <= MB
    assert response.stream.given * 256 < len(packed) / 8  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "encoding", ["br", "zstd", "gzip, gzip", "deflate,gzip", "compress", "€", "x" * 5000]
)
async def test_an_encoding_that_was_not_asked_for_is_unreadable(encoding: str) -> None:
    """Also two of them: a body that is compressed twice can grow a million times."""
    response = httpx.Response(
        200, headers=[(b"content-encoding", encoding.encode())], stream=_Cut(b"x" * 10, 5)
    )

    with pytest.raises(ReplyUnreadable, match="not supported"):
        await body_of(response, max_bytes=100)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    "data", [b"no gzip", gzip.compress(b"x" * 90)[:10] + b"\xff" * 40], ids=["other bytes", "a broken body"]
)
async def test_bytes_that_do_not_decompress_are_unreadable(encoding: str, data: bytes) -> None:
    """The caller does not get the error of zlib."""
    with pytest.raises(ReplyUnreadable):
        await body_of(_response(data, encoding), max_bytes=100)


@pytest.mark.parametrize(
    "raised",
    [
        httpx.DecodingError("x"),
        httpx.InvalidURL("x"),
        httpx.CookieConflict("x"),
        httpx.StreamConsumed(),
        UnicodeDecodeError("ascii", b"\xff", 0, 1, "x"),
        LookupError("x"),
        OverflowError("x"),
        RecursionError("x"),
        RuntimeError("x"),
        AssertionError("x"),
    ],
)
async def test_whatever_a_library_raises_for_a_reply_is_one_error(raised: Exception) -> None:
    """By their base class: also undocumented exceptions."""
    response = httpx.Response(200, stream=_Cut(b"abc", 1, raised))

    with pytest.raises(ReplyUnreadable, match=type(raised).__name__):
        await body_of(response, max_bytes=100)


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [
        (httpx.RemoteProtocolError("x"), httpx.RemoteProtocolError),
        (httpx.ReadTimeout("x"), httpx.ReadTimeout),
        (OSError("x"), httpx.ReadError),
        (PermanentToolError("x"), PermanentToolError),
    ],
)
async def test_a_broken_connection_and_our_own_errors_keep_their_kind(
    raised: Exception, becomes: type[Exception]
) -> None:
    """The caller can retry after the one, and knows the meaning of the other."""

    async def fails() -> None:
        raise raised

    with pytest.raises(becomes):
        await with_translated_errors(fails())


@pytest.mark.parametrize(
    ("content_type", "text"),
    [
        ("text/plain; charset=utf-8", "ü"),
        ("text/plain", "ü"),
        ("", "ü"),
        ("text/plain; charset=latin-1", "Ã¼"),
        *(
            (f"text/plain; charset={name}", "ü")
            for name in (
                *("hex", "base64", "zlib", "bz2", "rot13", "quopri", "uu", "idna", "punycode", "undefined"),
                *("unicode_escape", "raw-unicode-escape", "UTF-7", "no-such-codec", "x" * 9000, "os.path"),
                *('"', "=", "utf-8;charset=hex", "utf_8_sig", "\udcff", "ü"),
            )
        ),
    ],
)
def test_a_body_has_text_whatever_character_set_it_names(content_type: str, text: str) -> None:
    """An unknown character set counts as missing."""
    assert text_of_body("ü".encode(), content_type) == text


@pytest.mark.parametrize(
    ("value", "ms"),
    [
        *(("1e308", MAX_RETRY_AFTER_MS), ("9" * 400, None), ("1e999", None), ("nan", None), ("inf", None)),
        *(("-inf", None), ("-5", 0), ("1e-400", 0), ("0x10", None), ("٣", 3000), ("1_0", 10_000), ("", None)),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER_MS),
        ("Fri, 31 Dec 9999 23:59:59 -2359", MAX_RETRY_AFTER_MS),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0),
        ("Thu, 01 Jan 2026 12:00:07 GMT", 7000),
        ("Thu, 01 Jan 2026 12:00:07", 7000),
        *(("Thu, 99 Jan 2026 12:00:07 GMT", None), ("Thu, 01 Jan 99999999 00:00:00 GMT", None)),
        *(("Thu, 01 Jan 2026 12:00:07 +99999999999", None), ("," * 500, None), ("(" * 5000, None)),
    ],
)
@pytest.mark.parametrize("header", ["retry-after", "Retry-After"])
def test_a_pause_is_a_number_of_milliseconds_or_not_given(header: str, value: str, ms: int | None) -> None:
    """Never an error, and never longer than a day."""
    headers = httpx.Headers([(header.encode(), value.encode())])

    assert retry_after_ms(headers, now=NOON) == ms


async def test_a_body_of_very_small_pieces_is_not_read_to_its_end() -> None:
    """They cost time, not memory; the loop has its breath between them."""
    with pytest.raises(ReplyTooLarge, match="too many pieces"):
        await body_of(_response(b"x" * 15_000, size=1), max_bytes=100_000)
    assert await beginning_of(_response(b"x" * 15_000, size=1), max_bytes=100_000) == (b"x" * 10_000, True)
