"""Connections to a provider: the only place that opens and keeps them."""

from __future__ import annotations

import time
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

# httpx would load these with its first request: a tenth of a second in which no other run moves.
import anyio._backends._asyncio  # noqa: F401
import httpcore  # noqa: F401
import httpx

from openagents_worker.loops import PerLoop, http_transports
from openagents_worker.secret_forms import remember_secrets_of_url

__all__ = ["ConnectionPool", "proxy_problem"]

MAX_IDLE = 200  # enough for the steady part of a load; the rest of a burst is closed
IDLE_S = 30.0  # below the 60 s and more after which servers and load balancers close silently

SOCKS = ("socks5", "socks5h")
PROXY_SCHEMES = "http://, https://, socks5://, socks5h://"

_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=IDLE_S)


class _Idle(NamedTuple):
    lane: httpx.AsyncHTTPTransport
    since: float


class _OnLoop:
    """The lanes of one event loop: those that wait for a request, and those on their way."""

    def __init__(self) -> None:
        self.idle: deque[_Idle] = deque()
        self.busy: set[httpx.AsyncHTTPTransport] = set()

    async def end(self, lane: httpx.AsyncHTTPTransport) -> None:
        self.busy.discard(lane)
        await lane.aclose()

    async def close(self) -> None:
        while self.idle:
            await self.idle.pop().lane.aclose()

    def transports(self) -> Iterator[Any]:
        for lane in [*self.busy, *(one.lane for one in self.idle)]:
            yield from http_transports(lane)

    def forget(self) -> None:
        self.idle.clear()
        self.busy.clear()


class ConnectionPool(httpx.AsyncBaseTransport):
    """A connection for each request that is under way to one server; idle ones are used again, latest first.

    httpx's own pool looks at all its connections for every request: with a thousand calls waiting that was
    17 ms of CPU a call. A lane is such a pool of one, so a call costs the same however many wait.
    """

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the certificates of the system, which takes a tenth of a second."""
        self._certificates = httpx.create_ssl_context()
        self._proxy = _proxy(httpx.URL(url))
        self._clock = clock
        self._on_loops: PerLoop[_OnLoop] = PerLoop(_OnLoop)
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        here = self._on_loops.here()
        lane = here.idle.pop().lane if here.idle else self._open()
        here.busy.add(lane)
        try:
            response = await lane.handle_async_request(request)
        except BaseException:
            await here.end(lane)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Reply(response.stream, lane, here, self)
        return response

    def _open(self) -> httpx.AsyncHTTPTransport:
        return httpx.AsyncHTTPTransport(verify=self._certificates, limits=_ONE, proxy=self._proxy)

    async def release(self, lane: httpx.AsyncHTTPTransport, here: _OnLoop) -> None:
        """Take a lane back that is no longer needed, and close those that nobody has needed for long."""
        if self._closed:
            await here.end(lane)
            return
        now = self._clock()
        here.busy.discard(lane)
        here.idle.append(_Idle(lane, now))
        while len(here.idle) > MAX_IDLE or here.idle[0].since < now - IDLE_S:
            await here.idle.popleft().lane.aclose()

    async def aclose(self) -> None:
        """Close the idle lanes of this loop now, the others when their reply ends."""
        self._closed = True
        await self._on_loops.close()


class _Reply(httpx.AsyncByteStream):
    """The bytes of a reply; once closed, its lane is free."""

    def __init__(
        self,
        stream: httpx.AsyncByteStream,
        lane: httpx.AsyncHTTPTransport,
        here: _OnLoop,
        lanes: ConnectionPool,
    ) -> None:
        self._stream, self._lane, self._here, self._lanes = stream, lane, here, lanes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        except BaseException:
            await self._here.end(self._lane)
            raise
        await self._lanes.release(self._lane, self._here)


def proxy_problem(url: str) -> tuple[str, str] | None:
    """Why the proxy that the environment names for an address cannot be used, and a hint; None if it can."""
    variable, proxy = _proxy_variable(httpx.URL(url))
    remember_secrets_of_url(proxy)
    scheme = proxy.partition("://")[0].lower()
    if not proxy:
        return None
    if scheme not in ("http", "https", *SOCKS):
        return (
            f"{variable} names a proxy with the unknown scheme {scheme!r}",
            f"known schemes: {PROXY_SCHEMES}",
        )
    if scheme in SOCKS and find_spec("socksio") is None:
        return (
            f"{variable} names a {scheme}:// proxy, which needs a package that is not installed",
            "pip install socksio, or name an http:// proxy, or add the model's host to NO_PROXY",
        )
    try:
        has_host = bool(httpx.Proxy(proxy).url.host)
    except (httpx.InvalidURL, ValueError):
        has_host = False
    return None if has_host else (f"{variable} is not a URL", "for example http://proxy.example.com:3128")


def _proxy(url: httpx.URL) -> str | None:
    return _proxy_variable(url)[1] or None


def _proxy_variable(url: httpx.URL) -> tuple[str, str]:
    """What HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY name for this address: a variable, a proxy."""
    proxies = urllib.request.getproxies()
    kind = url.scheme if proxies.get(url.scheme) else "all"
    proxy = proxies.get(kind, "")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return "", ""
    return f"{kind.upper()}_PROXY", proxy if "://" in proxy else f"http://{proxy}"
