"""Connections to a provider: the only place that opens them and keeps idle ones."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

# httpx would import these with its first request, which blocks the event loop for 0.1 s.
import anyio._backends._asyncio  # noqa: F401
import httpcore  # noqa: F401
import httpx

from openagents_worker.llm.connection_options import ConnectionOptions
from openagents_worker.loops import PerLoop, http_transports
from openagents_worker.telemetry.logs import get_logger

__all__ = ["ConnectionPool"]

log = get_logger(__name__)

MAX_IDLE = 200  # enough for a steady load; the extra connections of a burst are closed
IDLE_S = 30.0  # servers and load balancers close idle connections silently after 60 s or more

_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=IDLE_S)


class _Idle(NamedTuple):
    transport: httpx.AsyncHTTPTransport
    since: float


class _LoopConnections:
    """The connections of one event loop: idle ones, and those with a request in progress."""

    def __init__(self) -> None:
        self.idle: deque[_Idle] = deque()
        self.busy: set[httpx.AsyncHTTPTransport] = set()

    async def discard(self, transport: httpx.AsyncHTTPTransport) -> None:
        self.busy.discard(transport)
        await transport.aclose()

    async def close(self) -> None:
        while self.idle:
            await self.idle.pop().transport.aclose()

    def transports(self) -> Iterator[Any]:
        for transport in [*self.busy, *(each.transport for each in self.idle)]:
            yield from http_transports(transport)

    def forget(self) -> None:
        self.idle.clear()
        self.busy.clear()


class ConnectionPool(httpx.AsyncBaseTransport):
    """Connections to one server, one per request in progress. The idle one used last is reused first.

    httpx's own pool scans all its connections for every request. With a thousand waiting calls, that took
    17 ms of CPU per call. Here each connection is an httpx transport with a pool of one, so the cost of a
    call does not depend on the number of waiting calls.

    A connection with HTTP/2 has one request in progress, too. httpcore does not reset the stream of a
    cancelled request, so the provider learns only from a closed connection that nobody reads the reply.
    """

    def __init__(
        self,
        url: str,
        *,
        options: ConnectionOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the certificates, which takes 0.1 s: call it in a thread. Raises `ValueError` for a file
        that cannot be used."""
        self._options = options or ConnectionOptions()
        self._url = httpx.URL(url)
        self._file_stamps = self._options.stamps()
        self._certificates = self._options.context(self._url)
        self._proxy = self._options.proxy_for(self._url, self._certificates)
        self._http2 = self._options.uses_http2
        if self._http2:  # httpx would import it with its first connection
            importlib.import_module("h2.connection")
        self._clock = clock
        self._on_loops: PerLoop[_LoopConnections] = PerLoop(_LoopConnections)
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        connections = self._on_loops.here()
        if connections.idle:
            transport = connections.idle.pop().transport
        else:
            if self._options.stamps() != self._file_stamps:
                await self._read_certificates_again()
            transport = self._open()
        connections.busy.add(transport)
        try:
            response = await transport.handle_async_request(request)
        except BaseException:
            await connections.discard(transport)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        is_http2 = response.extensions.get("http_version") == b"HTTP/2"
        response.stream = _PooledReply(response.stream, transport, connections, self, is_http2=is_http2)
        return response

    def _open(self) -> httpx.AsyncHTTPTransport:
        return httpx.AsyncHTTPTransport(
            verify=self._certificates, limits=_ONE, proxy=self._proxy, http2=self._http2
        )

    async def _read_certificates_again(self) -> None:
        """New connections use the certificates that have replaced the old ones. Files that do not fit
        together, because one of them is not written yet, are tried again with the next connection."""
        stamps = self._options.stamps()
        try:
            certificates = await asyncio.to_thread(self._options.context, self._url)
        except ValueError as error:
            log.warning("llm.certificates_unreadable", host=self._url.host, error=str(error))
            return
        self._certificates, self._file_stamps = certificates, stamps
        self._proxy = self._options.proxy_for(self._url, certificates)

    async def release(self, transport: httpx.AsyncHTTPTransport, connections: _LoopConnections) -> None:
        """Make a connection idle again, and close connections that were idle for longer than `IDLE_S`."""
        if self._closed:
            await connections.discard(transport)
            return
        now = self._clock()
        connections.busy.discard(transport)
        connections.idle.append(_Idle(transport, now))
        while len(connections.idle) > MAX_IDLE or connections.idle[0].since < now - IDLE_S:
            await connections.idle.popleft().transport.aclose()

    async def aclose(self) -> None:
        """Close the idle connections of this loop now, and each other one when its reply ends."""
        self._closed = True
        await self._on_loops.close()


class _PooledReply(httpx.AsyncByteStream):
    """The bytes of a reply. Closing it returns its connection to the pool."""

    def __init__(
        self,
        stream: httpx.AsyncByteStream,
        transport: httpx.AsyncHTTPTransport,
        connections: _LoopConnections,
        pool: ConnectionPool,
        *,
        is_http2: bool,
    ) -> None:
        self._stream, self._transport, self._connections, self._pool = stream, transport, connections, pool
        # httpcore closes a connection of HTTP/1.1 whose reply was not read to its end, but not one of HTTP/2.
        self._is_read = not is_http2

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._stream.__aiter__() if self._is_read else self._read_to_the_end()

    async def _read_to_the_end(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part
        self._is_read = True

    async def aclose(self) -> None:
        """Return the connection; close it if the reply was not read to its end."""
        try:
            await self._stream.aclose()
        except BaseException:
            await self._connections.discard(self._transport)
            raise
        if self._is_read:
            await self._pool.release(self._transport, self._connections)
        else:
            await self._connections.discard(self._transport)
