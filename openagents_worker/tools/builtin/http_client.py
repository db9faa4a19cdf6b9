"""The HTTP client of tools: the only place that decides which addresses a tool may reach.

It connects to exactly the address that was checked, also for every redirect. So a host name that later
resolves to another address (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import anyio._backends._asyncio  # noqa: F401 - httpcore would import it with its first connection
import httpcore
import httpx

from openagents_worker.errors import PermanentToolError
from openagents_worker.http_replies import no_cookies
from openagents_worker.loops import PerLoop, http_transports
from openagents_worker.tools.builtin.networks import is_public

__all__ = ["open_client"]


async def open_client(
    tool_name: str, allow_hosts: Sequence[str] | None, deny_private: bool, *, timeout_s: float
) -> httpx.AsyncClient:
    """A client that follows no redirects, keeps no cookies and ignores the proxies of the environment.

    `allow_hosts`: the hosts that it may reach, also private ones; None: any. `deny_private`: whether it
    refuses addresses that are not on the public internet. Its requests raise `PermanentToolError` then.
    """
    certificates = await asyncio.to_thread(_certificates)
    return httpx.AsyncClient(
        transport=CheckedAddressTransport(allow_hosts, deny_private, certificates, tool_name),
        timeout=timeout_s,
        follow_redirects=False,  # the caller follows them: httpx would read each body to its end
        trust_env=False,
        cookies=no_cookies(),
        headers={"user-agent": "openagents-worker"},
    )


class _LoopTransport:
    """The HTTP connections of one event loop."""

    def __init__(self, certificates: ssl.SSLContext, network: httpcore.AsyncNetworkBackend) -> None:
        self.http = httpx.AsyncHTTPTransport(verify=certificates)
        limits = httpx.Limits(max_connections=100, max_keepalive_connections=20)  # the defaults of httpx
        # httpx has no argument for the network of its pool.
        self.http._pool = httpcore.AsyncConnectionPool(
            ssl_context=certificates,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=network,
        )

    async def close(self) -> None:
        await self.http.aclose()

    def transports(self) -> Iterator[Any]:
        return http_transports(self.http)

    def forget(self) -> None:
        """There is nothing else to release."""


class CheckedAddressTransport(httpx.AsyncBaseTransport):
    """Checks the host of each request, and the address of each connection.

    The pool knows a connection by the host name of its requests, not by its address. So a connection whose
    certificate was verified for one host is not used for another host at the same address.
    """

    def __init__(
        self,
        allow_hosts: Sequence[str] | None,
        deny_private: bool,
        certificates: ssl.SSLContext,
        tool_name: str,
    ) -> None:
        self._allow_hosts = None if allow_hosts is None else [host.lower() for host in allow_hosts]
        self._tool_name = tool_name
        # A host that `allow_hosts` names may be private.
        network = _CheckedNetwork(tool_name, deny_private=deny_private and allow_hosts is None)
        self._inner: PerLoop[_LoopTransport] = PerLoop(lambda: _LoopTransport(certificates, network))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises `PermanentToolError` for a host that is not allowed."""
        self._require_allowed(request.url)
        return await self._inner.here().http.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.close()

    def _require_allowed(self, url: httpx.URL) -> None:
        """`allow_hosts` may name a host as people write it (`straße.de`) or as it is sent (`xn--...`)."""
        if self._allow_hosts is None:
            return
        names = {name.lower().rstrip(".") for name in (url.host, url.raw_host.decode("ascii"))}
        if not any(fnmatchcase(name, allowed) for name in names for allowed in self._allow_hosts):
            raise PermanentToolError(f"{url.host.rstrip('.')} is not in allow_hosts", self._tool_name)


class _CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Resolves a host, checks its addresses, and connects to exactly one of the checked addresses."""

    def __init__(self, tool_name: str, *, deny_private: bool) -> None:
        self._tool_name = tool_name
        self._deny_private = deny_private
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *args: Any, **options: Any
    ) -> Any:
        *others, last = await self._checked_addresses(host.rstrip("."), port)
        for address in others:
            try:
                stream = await self._network.connect_tcp(address, port, timeout, *args, **options)
            except httpcore.ConnectError:  # the next address may accept the connection
                continue
            return _Stream(stream)
        return _Stream(await self._network.connect_tcp(last, port, timeout, *args, **options))

    async def _checked_addresses(self, host: str, port: int) -> list[str]:
        """The addresses of a host, at least one. Raises `PermanentToolError` if one of them is denied."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if self._deny_private and not all(map(is_public, addresses)):
            raise PermanentToolError(
                f"{host} is in a private network",
                self._tool_name,
                hint=f"name it in allow_hosts of the {self._tool_name} tool if it is meant to be reached",
            )
        return addresses


class _Stream:
    """A connection that is closed if its TLS handshake is cancelled; httpcore leaves it open then."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._inner = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def start_tls(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        try:
            return await self._inner.start_tls(*args, **options)
        except BaseException:
            await self._inner.aclose()
            raise


@lru_cache(maxsize=1)  # reading the certificates takes 0.1 s
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()
