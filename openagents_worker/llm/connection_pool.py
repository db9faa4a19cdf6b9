"""Connections to a provider: the only place that opens them and keeps idle ones."""

from __future__ import annotations

import time
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

# httpx would import these with its first request, which blocks the event loop for 0.1 s.
import anyio._backends._asyncio  # noqa: F401
import httpcore  # noqa: F401
import httpx

from openagents_worker.loops import PerLoop, http_transports
from openagents_worker.secret_forms import remember_secrets_of_url

__all__ = ["ConnectionPool", "proxy_problem"]

MAX_IDLE = 200  # enough for a steady load; the extra connections of a burst are closed
IDLE_S = 30.0  # servers and load balancers close idle connections silently after 60 s or more

SOCKS = ("socks5", "socks5h")
PROXY_SCHEMES = "http://, https://, socks5://, socks5h://"

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
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the certificates of the system, which takes 0.1 s: call it in a thread."""
        self._certificates = httpx.create_ssl_context()
        self._proxy = _proxy(httpx.URL(url))
        self._clock = clock
        self._on_loops: PerLoop[_LoopConnections] = PerLoop(_LoopConnections)
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        connections = self._on_loops.here()
        transport = connections.idle.pop().transport if connections.idle else self._open()
        connections.busy.add(transport)
        try:
            response = await transport.handle_async_request(request)
        except BaseException:
            await connections.discard(transport)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _PooledReply(response.stream, transport, connections, self)
        return response

    def _open(self) -> httpx.AsyncHTTPTransport:
        return httpx.AsyncHTTPTransport(verify=self._certificates, limits=_ONE, proxy=self._proxy)

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
    ) -> None:
        self._stream, self._transport, self._connections, self._pool = stream, transport, connections, pool

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        except BaseException:
            await self._connections.discard(self._transport)
            raise
        await self._pool.release(self._transport, self._connections)


def proxy_problem(url: str) -> tuple[str, str] | None:
    """Why the proxy that the environment sets for this URL cannot be used, and a hint. None: it can be used,
    or there is no proxy."""
    variable, proxy = _proxy_variable(httpx.URL(url))
    remember_secrets_of_url(proxy)
    scheme = proxy.partition("://")[0].lower()
    if not proxy:
        return None
    if scheme not in ("http", "https", *SOCKS):
        return (
            f"the proxy in {variable} has the unknown scheme {scheme!r}",
            f"known schemes: {PROXY_SCHEMES}",
        )
    if scheme in SOCKS and find_spec("socksio") is None:
        return (
            f"the {scheme}:// proxy in {variable} requires a package that is not installed",
            "pip install socksio, or use an http:// proxy, or add the model's host to NO_PROXY",
        )
    try:
        has_host = bool(httpx.Proxy(proxy).url.host)
    except (httpx.InvalidURL, ValueError):
        has_host = False
    return None if has_host else (f"{variable} is not a URL", "for example http://proxy.example.com:3128")


def _proxy(url: httpx.URL) -> str | None:
    return _proxy_variable(url)[1] or None


def _proxy_variable(url: httpx.URL) -> tuple[str, str]:
    """The name of the environment variable that sets a proxy for this URL, and the proxy; "" without one.

    Reads HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.
    """
    proxies = urllib.request.getproxies()
    kind = url.scheme if proxies.get(url.scheme) else "all"
    proxy = proxies.get(kind, "")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return "", ""
    return f"{kind.upper()}_PROXY", proxy if "://" in proxy else f"http://{proxy}"
