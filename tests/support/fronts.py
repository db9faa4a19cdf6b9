"""Servers between a model client and the model server. Real: TLS, a forward proxy, a server with HTTP/2."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config

from openagents_worker.testing.model_server.listening import Serve
from tests.support.listening import listening

__all__ = ["ForwardProxy", "Http2Server", "forward_proxy", "http2_server", "tls_front"]


@asynccontextmanager
async def _listening(handle: Serve, tls: ssl.SSLContext | None = None) -> AsyncGenerator[int]:
    """Serves connections and closes each of them at the end. Yields the port."""

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            await handle(reader, writer)

    async with listening(serve_one, tls=tls) as port:
        yield port


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while some := await reader.read(65_536):
            writer.write(some)
            await writer.drain()
    writer.close()


async def _joined(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int, first: bytes = b""
) -> None:
    """Pass on all bytes in both directions between a connection and a port."""
    to_reader, to_writer = await asyncio.open_connection("127.0.0.1", port)
    to_writer.write(first)
    try:
        await asyncio.gather(_pass_on(reader, to_writer), _pass_on(to_reader, writer))
    finally:
        to_writer.close()


@asynccontextmanager
async def tls_front(port: int, tls: ssl.SSLContext) -> AsyncGenerator[str]:
    """Speaks TLS with clients, and passes on what they send to a port. Yields the URL for `llm.api_base`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _joined(reader, writer, port)

    async with _listening(handle, tls) as own_port:
        yield f"https://localhost:{own_port}/v1"


@dataclass
class ForwardProxy:
    """A proxy, and the first line of each request to it."""

    port: int = 0
    requests: list[str] = field(default_factory=list)

    def url(self, login: str = "") -> str:
        return f"http://{login}127.0.0.1:{self.port}"


@asynccontextmanager
async def forward_proxy(login: str | None = None) -> AsyncGenerator[ForwardProxy]:
    """A proxy for CONNECT and for plain requests; every host is this machine. `login`: "user:password"."""
    proxy = ForwardProxy()
    expected = None if login is None else b"basic " + base64.b64encode(login.encode()).lower()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        proxy.requests.append(head.split(b"\r\n")[0].decode())
        if expected is not None and expected not in head.lower():
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
            await writer.drain()
            return
        method, target, _ = proxy.requests[-1].split(" ")
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            await _joined(reader, writer, int(target.rpartition(":")[2]))
            return
        host = target.split("/")[2]
        await _joined(
            reader, writer, int(host.rpartition(":")[2]), head.replace(b"http://" + host.encode(), b"")
        )

    async with _listening(handle) as proxy.port:
        yield proxy


@dataclass
class Http2Server:
    """What a server with HTTP/2 has seen."""

    url: str = ""
    versions: list[str] = field(default_factory=list)
    """The version of HTTP of each request."""
    clients: set[Any] = field(default_factory=set)
    """The address of each connection."""
    gone: int = 0
    """Clients that left before their reply was complete."""


Reply = Callable[[dict[str, Any]], Awaitable[list[bytes]]]


@asynccontextmanager
async def http2_server(
    pieces: list[bytes], cert: Path, *, hangs: bool = False
) -> AsyncGenerator[Http2Server]:
    """Hypercorn, which offers HTTP/2 and HTTP/1.1 over TLS. It answers with these pieces of a stream.

    `hangs`: the reply does not end. `cert`: a PEM file with the server's certificate and key.
    """
    seen, over = Http2Server(), asyncio.Event()

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        seen.versions.append(scope["http_version"])
        seen.clients.add(scope["client"])
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        json.loads(body)
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if hangs:
            while (await receive())["type"] != "http.disconnect":
                pass
            seen.gone += 1
            return
        await send({"type": "http.response.body", "body": b""})

    listening = socket.create_server(("127.0.0.1", 0))
    seen.url = f"https://localhost:{listening.getsockname()[1]}/v1"
    config = Config()
    config.bind = [f"fd://{listening.detach()}"]  # hypercorn closes it
    config.certfile = config.keyfile = str(cert)
    config.accesslog = config.errorlog = None
    server = asyncio.create_task(serve(app, config, shutdown_trigger=over.wait))  # type: ignore[arg-type]
    try:
        yield seen
    finally:
        over.set()
        await server
