"""The proxies of the tests close all connections, at whatever moment they end."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest

from tests.support.command_proxy import Proxy as CountingProxy
from tests.support.lossy_proxy import Proxy


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(url).port or 0))


def is_cut(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("waits", [True, False], ids=["opened", "being opened"])
@pytest.mark.parametrize("kind", [Proxy, CountingProxy])
def test_every_line_is_cut_at_the_end(kind: type[Proxy | CountingProxy], waits: bool, redis_url: str) -> None:
    """Also one that was accepted a moment ago: its task is cancelled before it has begun."""
    with kind(redis_url) as proxy:
        url = proxy.url if isinstance(proxy, Proxy) else proxy.url_of("worker")
        clients = [connect(url) for _ in range(20)]
        for client in clients if waits else []:
            client.sendall(b"*1\r\n$4\r\nPING\r\n")
            assert client.recv(7) == b"+PONG\r\n"

    for client in clients:
        assert is_cut(client)
        client.close()


def test_after_it_hangs_up_nobody_is_connected_any_more(redis_url: str) -> None:
    """Whoever is, stays."""
    with Proxy(redis_url) as proxy, connect(proxy.url) as client:
        client.sendall(b"*1\r\n$4\r\nPING\r\n")
        assert client.recv(7) == b"+PONG\r\n"
        proxy.hang_up()
        with pytest.raises(ConnectionRefusedError):
            connect(proxy.url)
        client.sendall(b"*1\r\n$4\r\nPING\r\n")
        assert client.recv(7) == b"+PONG\r\n"
