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

    def __init__(self, certificates: ssl.SSLContext) -> None:
        self.http = httpx.AsyncHTTPTransport(verify=certificates)

    async def close(self) -> None:
        await self.http.aclose()

    def transports(self) -> Iterator[Any]:
        return http_transports(self.http)

    def forget(self) -> None:
        """There is nothing else to release."""


class CheckedAddressTransport(httpx.AsyncBaseTransport):
    """Resolves a host, checks its addresses, and connects to exactly one of the checked addresses."""

    def __init__(
        self,
        allow_hosts: Sequence[str] | None,
        deny_private: bool,
        certificates: ssl.SSLContext,
        tool_name: str,
    ) -> None:
        self._allow_hosts = None if allow_hosts is None else [host.lower() for host in allow_hosts]
        self._deny_private = deny_private
        self._tool_name = tool_name
        self._inner: PerLoop[_LoopTransport] = PerLoop(lambda: _LoopTransport(certificates))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        addresses = await self._addresses(request)
        inner = self._inner.here().http
        for address in addresses[:-1]:
            try:
                return await inner.handle_async_request(_with_address(request, address))
            except httpx.ConnectError:  # nothing was sent, so the next address can be tried
                continue
        return await inner.handle_async_request(_with_address(request, addresses[-1]))

    async def aclose(self) -> None:
        await self._inner.close()

    async def _addresses(self, request: httpx.Request) -> list[str]:
        """Resolve and check the host. Raises `PermanentToolError` for a host that is not allowed."""
        host = request.url.host.lower().rstrip(".")
        is_allowed = self._allow_hosts is not None and any(
            fnmatchcase(host, allowed) for allowed in self._allow_hosts
        )
        if self._allow_hosts is not None and not is_allowed:
            raise PermanentToolError(f"{host} is not in allow_hosts", self._tool_name)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, request.url.port, type=socket.SOCK_STREAM
            )
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"{host} cannot be resolved", request=request) from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if self._deny_private and not is_allowed and not all(map(is_public, addresses)):
            raise PermanentToolError(
                f"{host} is in a private network",
                self._tool_name,
                hint=f"name it in allow_hosts of the {self._tool_name} tool if it is meant to be reached",
            )
        return addresses


@lru_cache(maxsize=1)  # reading the certificates takes 0.1 s
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _with_address(request: httpx.Request, address: str) -> httpx.Request:
    """The request, sent to one address. The `Host` header and the certificate check keep the host name."""
    return httpx.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": request.url.host},
    )
