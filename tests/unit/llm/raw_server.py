"""A real HTTP server that answers every request with given bytes, and the bytes of streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from tests.support.listening import listening

JSON = "content-type: application/json"
STREAM = "content-type: text/event-stream"


class Sent(NamedTuple):
    """One reply: its head, its status and its body in chunks."""

    chunks: tuple[bytes, ...]
    head: str = STREAM
    status: str = "200 OK"
    hangs: bool = False
    """Whether the connection stays open after the last chunk, until the server ends."""


@asynccontextmanager
async def raw_server(*chunks: bytes, head: str = STREAM, status: str = "200 OK") -> AsyncGenerator[str]:
    """Sends these bytes, one write per chunk, and hangs up. Yields the URL for `llm.api_base`."""
    async with answering(lambda _: Sent(chunks, head, status)) as url:
        yield url


@asynccontextmanager
async def answering(
    reply: Callable[[Any], Sent | Awaitable[Sent]], paths: list[str] | None = None
) -> AsyncGenerator[str]:
    """Answers each request with what the function returns for its body; None: it has none. Yields the URL.
    `paths` collects the paths of the requests, with their queries."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if paths is not None:
            paths.append(request.split(b" ")[1].decode())
        lines = request.lower().split(b"\r\n")
        length = next((int(line[16:]) for line in lines if line.startswith(b"content-length:")), 0)
        sent = reply(json.loads(await reader.readexactly(length)) if length else None)
        if isinstance(sent, Awaitable):
            sent = await sent
        writer.write(f"HTTP/1.1 {sent.status}\r\n{sent.head}\r\nconnection: close\r\n\r\n".encode())
        for chunk in sent.chunks:
            writer.write(chunk)
            await writer.drain()
        if sent.hangs:
            await over.wait()
        writer.close()
        await writer.wait_closed()

    over = asyncio.Event()
    async with listening(answer) as port:
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            over.set()


def sse(*events: Any) -> bytes:
    """Events of a stream: texts as they are, other values as JSON."""
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def delta(finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk of a streamed chat completion."""
    return {
        "id": "c",
        "model": "m",
        "choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}],
    }


def whole(finish_reason: str | None = "stop", *, usage: Any = None, **message: Any) -> dict[str, Any]:
    """A chat completion that is not streamed."""
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    return {"id": "c", "model": "m", "choices": [choice], "usage": usage}
