"""A hostile model server. It sends any bytes that a test defines, over real sockets."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.listening import listening

__all__ = ["FAULTY", "LARGE", "MB", "Answer", "serving"]

MB = 1024 * 1024
JSON = "content-type: application/json"
STREAM = "content-type: text/event-stream"
CHUNKED = "transfer-encoding: chunked"

Pieces = AsyncGenerator[bytes, None]


@dataclass(frozen=True)
class Answer:
    """A complete reply, including the status line, and the error codes that the worker may make of it."""

    pieces: Callable[[], Pieces]
    codes: tuple[str, ...]


def _head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode("latin-1")


def _bytes(data: bytes) -> Callable[[], Pieces]:
    async def pieces() -> Pieces:
        yield data

    return pieces


def _repeating(head: bytes, first: bytes, again: bytes, times: int | None) -> Callable[[], Pieces]:
    """`head`, `first`, and then `again`, repeated `times` times; None: endlessly."""

    async def pieces() -> Pieces:
        yield head + first
        sent = 0
        while times is None or sent < times:
            yield again
            sent += 1

    return pieces


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _packed(wbits: int, part: bytes, times: int, name: str) -> Callable[[], Pieces]:
    """A compressed body of `times` equal parts. After a full flush, the compressed part can be repeated."""
    made = zlib.compressobj(9, wbits=wbits)
    first = made.compress(part) + made.flush(zlib.Z_FULL_FLUSH)
    again = made.compress(part) + made.flush(zlib.Z_FULL_FLUSH)
    data = first + again * (times - 1) + made.flush()
    return _bytes(_head(JSON, f"content-encoding: {name}", f"content-length: {len(data)}") + data)


GZIP, DEFLATE = zlib.MAX_WBITS | 16, zlib.MAX_WBITS


def _plain(*lines: str, status: str = "200 OK", body: bytes = b"{}") -> Callable[[], Pieces]:
    return _bytes(_head(*lines, f"content-length: {len(body)}", status=status) + body)


def _event(**delta: Any) -> bytes:
    chunk = {"id": "c", "model": "m", "choices": [{"delta": delta, "finish_reason": None}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


TOO_LARGE = ("llm.too_large",)
BROKEN = ("llm.connection",)
UNUSABLE = ("llm.response",)
EITHER = ("llm.connection", "llm.response")
_TOOL_PIECE = {"tool_calls": [{"index": 0, "function": {"arguments": "x" * 500}}]}

LARGE: dict[str, Answer] = {
    "1 GB in 972 KB of gzip": Answer(_packed(GZIP, b"\0" * MB, 1000, "gzip"), TOO_LARGE),
    "1 GB in 1 MB of deflate": Answer(_packed(DEFLATE, b" " * MB, 1000, "deflate"), TOO_LARGE),
    "a gzip bomb that is a stream": Answer(
        lambda: _swapped(_packed(GZIP, b"\n" * MB, 1000, "gzip"), JSON, STREAM),
        ("llm.too_large", "llm.connection"),
    ),
    "1 GB with a length": Answer(
        _repeating(_head(JSON, f"content-length: {1000 * MB}"), b"[", b"[]," * 87_381, 4096), TOO_LARGE
    ),
    "a body without end": Answer(
        _repeating(_head(JSON, "connection: close"), b"", b"x" * 65536, None), TOO_LARGE
    ),
    "chunks without end": Answer(
        _repeating(_head(JSON, CHUNKED), b"", _chunk(b"x" * 65536), None), TOO_LARGE
    ),
    "one byte a chunk, without end": Answer(
        _repeating(_head(JSON, CHUNKED), b"", _chunk(b"x") * 8192, None), TOO_LARGE
    ),
    "one line of a stream without end": Answer(
        _repeating(_head(STREAM, "connection: close"), b"data: ", b"x" * 65536, None), TOO_LARGE
    ),
    "one line of a stream, a byte a chunk": Answer(
        _repeating(_head(STREAM, CHUNKED), _chunk(b"data: "), _chunk(b"x") * 8192, None), TOO_LARGE
    ),
    "one event of a stream without end": Answer(
        _repeating(_head(STREAM, "connection: close"), b"", b"data:\n" * 10_000, None), TOO_LARGE
    ),
    "text without end": Answer(
        _repeating(_head(STREAM, "connection: close"), b"", _event(content="x" * 500) * 100, None), TOO_LARGE
    ),
    "text without end, a character a piece": Answer(
        _repeating(_head(STREAM, "connection: close"), b"", _event(content="ü") * 500, None), TOO_LARGE
    ),
    "arguments of a tool call without end": Answer(
        _repeating(_head(STREAM, "connection: close"), b"", _event(**_TOOL_PIECE) * 100, None), TOO_LARGE
    ),
    "an error without end": Answer(
        _repeating(
            _head("content-type: text/plain", "connection: close", status="400 Bad"),
            b"no: ",
            b"x" * 65536,
            None,
        ),
        UNUSABLE,
    ),
    "an error in gzip": Answer(
        lambda: _swapped(_packed(GZIP, b"\0" * MB, 1000, "gzip"), "200 OK", "400 Bad"), UNUSABLE
    ),
    "a million empty lists": Answer(_plain(JSON, body=b"[" + b"[]," * MB + b"[]]"), (*UNUSABLE, *TOO_LARGE)),
    "a million empty objects, of a failure": Answer(
        _plain(JSON, status="500 No", body=b"[" + b"{}," * MB + b"{}]"), ("llm.connection",)
    ),
}
"""Replies that would exhaust the memory or the time of a worker that reads them completely."""


async def _swapped(pieces: Callable[[], Pieces], old: str, new: str) -> Pieces:
    async with aclosing(pieces()) as given:
        async for piece in given:
            yield piece.replace(old.encode(), new.encode(), 1)


def _tool_calls(count: int) -> bytes:
    calls = [{"index": n, "id": f"c{n}", "function": {"name": "x", "arguments": ""}} for n in range(count)]
    return _event(tool_calls=calls)


FAULTY: dict[str, Answer] = {
    "not HTTP": Answer(_bytes(b"220 smtp.example.com ESMTP\r\n"), BROKEN),
    "nothing": Answer(_bytes(b""), BROKEN),
    "line ends without end": Answer(_repeating(b"", b"", b"\r\n" * 4096, None), BROKEN),
    "headers without end": Answer(
        _repeating(b"HTTP/1.1 200 OK\r\n", b"", b"x-a: b\r\n" * 4096, None), BROKEN
    ),
    "one header without end": Answer(
        _repeating(b"HTTP/1.1 200 OK\r\nx-a: ", b"", b"b" * 65536, None), BROKEN
    ),
    "a status line without end": Answer(_repeating(b"HTTP/1.1 200 ", b"", b"b" * 65536, None), BROKEN),
    "a status of 20 digits": Answer(_bytes(b"HTTP/1.1 " + b"2" * 20 + b" OK\r\n\r\n"), BROKEN),
    "a length of 5,000 digits": Answer(_bytes(_head(JSON, "content-length: " + "9" * 5000)), BROKEN),
    "a negative length": Answer(_bytes(_head(JSON, "content-length: -1")), BROKEN),
    "two lengths": Answer(_bytes(_head(JSON, "content-length: 1", "content-length: 2") + b"{}"), BROKEN),
    "a chunk that is not one": Answer(_bytes(_head(JSON, CHUNKED) + b"zz\r\n{}"), BROKEN),
    "a chunk of 20 hex digits": Answer(_bytes(_head(JSON, CHUNKED) + b"f" * 20 + b"\r\n{}"), BROKEN),
    "a chunk extension without end": Answer(
        _repeating(_head(JSON, CHUNKED), b"1;", b"x" * 65536, None), BROKEN
    ),
    "trailers without end": Answer(
        _repeating(_head(JSON, CHUNKED), b"2\r\n{}\r\n0\r\n", b"x-a: b\r\n" * 4096, None), BROKEN
    ),
    "another encoding": Answer(_plain(JSON, "content-encoding: br"), UNUSABLE),
    "gzip in gzip": Answer(_plain(JSON, "content-encoding: gzip, gzip"), UNUSABLE),
    "an encoding of no name": Answer(_plain(JSON, "content-encoding: \xff"), UNUSABLE),
    "no gzip": Answer(_plain(JSON, "content-encoding: gzip"), UNUSABLE),
    "torn gzip": Answer(
        _bytes(_head(JSON, "content-encoding: gzip", "content-length: 99") + gzip.compress(b"{}")), BROKEN
    ),
    "a codec as character set": Answer(_plain("content-type: application/json; charset=hex"), UNUSABLE),
    "a character set that fails": Answer(
        _plain("content-type: application/json; charset=undefined"), UNUSABLE
    ),
    "a character set in a faulty reply": Answer(
        _plain("content-type: text/plain; charset=idna", status="400 Bad", body=b"\xff" * 99), UNUSABLE
    ),
    "bytes that are not text": Answer(_plain(JSON, body=b"\xff\xfe\x00" * 50), UNUSABLE),
    "deep JSON": Answer(_plain(JSON, body=b"[" * 200_000), UNUSABLE),
    "a number of 5,000 digits": Answer(_plain(JSON, body=b"9" * 5000), UNUSABLE),
    "usage beyond all numbers": Answer(
        _plain(JSON, body=b'{"choices":[{"message":{"content":[1]}}],"usage":{"prompt_tokens":1e999}}'),
        UNUSABLE,
    ),
    "a pause of 1e308 seconds": Answer(_plain("retry-after: 1e308", status="429 No"), ("llm.rate_limit",)),
    "a pause of nan": Answer(_plain("retry-after: nan", status="429 No"), ("llm.rate_limit",)),
    "a pause until the year 9999": Answer(
        _plain("retry-after: Fri, 31 Dec 9999 23:59:59 -2359", status="429 No"), ("llm.rate_limit",)
    ),
    "a pause until never": Answer(
        _plain("retry-after: Thu, 01 Jan 2026 00:00:00 +99999999999", status="429 No"), ("llm.rate_limit",)
    ),
    "a pause of -1": Answer(_plain("retry-after: -1", status="503 No"), ("llm.rate_limit",)),
    "a redirect": Answer(_plain("location: http://[::1", status="302 Found"), EITHER),
    "a redirect elsewhere": Answer(_plain("location: http://127.0.0.1:1/", status="307 Again"), UNUSABLE),
    "a cookie that is not one": Answer(_plain(JSON, "set-cookie: =;;;\xff; domain=" + "x" * 9999), UNUSABLE),
    "informational replies": Answer(
        _bytes(b"HTTP/1.1 103 Early\r\nx: y\r\n\r\n" * 50 + _head(JSON, "content-length: 2") + b"{}"),
        UNUSABLE,
    ),
    "another protocol": Answer(
        _bytes(_head("upgrade: websocket", "connection: upgrade", status="101 Switch")), EITHER
    ),
    "a stream of what is not JSON": Answer(
        _bytes(_head(STREAM, "connection: close") + b"data: <html>\n\n"), ("llm.connection", "llm.response")
    ),
    "a stream of chunks that are not chunks": Answer(
        _bytes(
            _head(STREAM, "connection: close") + b'data: {"choices": [{"delta": {"tool_calls": [[1]]}}]}\n\n'
        ),
        UNUSABLE,
    ),
    "a stream with an index that is not one": Answer(
        _bytes(
            _head(STREAM, "connection: close")
            + b'data: {"choices": [{"delta": {"tool_calls": [{"index": {"a": 1}}]}}]}\n\n'
        ),
        EITHER,
    ),
    "a stream of 100,000 tool calls": Answer(
        _repeating(_head(STREAM, "connection: close"), b"", _tool_calls(5_000), 20),
        (*TOO_LARGE, "llm.connection"),
    ),
    "a stream that is never finished": Answer(
        _repeating(_head(STREAM, "connection: close"), b"", _event(content="x"), 10), EITHER
    ),
}
"""Malformed replies, for which an HTTP library may raise any exception."""


# --- the server ------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(answer: Callable[[bytes], Answer]) -> AsyncIterator[str]:
    """A server that sends `answer(head)` to each request and closes the connection. Yields its `api_base`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = (line.partition(b":") for line in head.lower().split(b"\r\n"))
            length = next((int(value) for name, _, value in lines if name == b"content-length"), 0)
            await reader.readexactly(length)
            async with aclosing(answer(head).pieces()) as pieces:
                async for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has closed the connection
        finally:
            writer.transport.abort() if writer.transport.get_write_buffer_size() > MB else writer.close()

    async with listening(serve) as port:
        yield f"http://127.0.0.1:{port}/v1"
