"""Servers of every kind that a team has. The only place that starts them.

The Redis servers are real; TLS is spoken by an end of our own before them, as a managed Redis has it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self
from urllib.parse import quote

import redis

from openagents_worker.local.redis_server import EmbeddedRedis
from tests.support.proxy import Line, Lines
from tests.tls.certificates import KEY_PASSWORD, Certificates

__all__ = ["PASSWORD", "USER", "Servers", "TlsEnd", "servers_in"]

PASSWORD = "p@ss:w/o?r#d%&=+;, ü€\"'[]{}<>\\|^`~!*()$%2F"
USER = "wörk:er@1"


class TlsEnd(Lines):
    """Speaks TLS with clients, and passes on what they say."""

    def __init__(self, redis_url: str, tls: ssl.SSLContext | None, host: str = "127.0.0.1") -> None:
        super().__init__(redis_url)
        self.tls, self.host = tls, host

    def opened(self) -> None:
        self.port = int(self.listen(_up, _down).rpartition(":")[2].partition("/")[0])


class RefusingEnd:
    """Requires a client certificate and sends an alert without it, as OpenSSL does; asyncio would only
    close."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="refusing end")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _serve(self) -> None:
        with suppress(OSError):  # it is shut down
            while True:
                connection, _ = self._listening.accept()
                with connection, suppress(OSError), self._tls.wrap_socket(connection, server_side=True):
                    raise AssertionError("a client was let in without a certificate")


async def _up(line: Line) -> None:
    await _pass_on(line.from_client, line.to_redis)


async def _down(line: Line) -> None:
    await _pass_on(line.from_redis, line.to_client)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while some := await reader.read(65_536):
        writer.write(some)
        await writer.drain()


@dataclass(frozen=True)
class Servers:
    """What is there, for the URLs of `variants.py`."""

    certificates: Certificates
    free: EmbeddedRedis
    """A Redis that asks for no password, at 127.0.0.1, at ::1 and at a socket."""
    locked: EmbeddedRedis
    """One with a password, and with a user who has the same one."""
    socket: Path
    locked_socket: Path
    tls: TlsEnd
    tls_6: TlsEnd
    tls_locked: TlsEnd
    tls_other_name: TlsEnd
    """Shows the certificate of another host."""
    tls_expired: TlsEnd
    tls_mutual: TlsEnd
    """Wants to see a certificate of the client's."""
    refusing: RefusingEnd

    def clear(self) -> None:
        for client in (self.inside(self.free, 0), self.inside(self.locked, 0)):
            with client:
                client.flushall()

    def inside(self, server: EmbeddedRedis, db: int) -> redis.Redis:
        """A client of the test's own, which needs no URL."""
        password = PASSWORD if server is self.locked else None
        return redis.Redis(port=server.port, db=db, password=password, decode_responses=True)

    @property
    def login(self) -> str:
        return f"{quote(USER, safe='')}:{quote(PASSWORD, safe='')}"

    @property
    def key_password(self) -> str:
        return quote(KEY_PASSWORD, safe="")


@contextmanager
def servers_in(folder: Path) -> Generator[Servers]:
    made = Certificates.made(folder)
    with ExitStack() as stack:
        short = Path(stack.enter_context(TemporaryDirectory(dir="/tmp")))  # a socket's path must not be long
        sockets = short / "free.sock", short / "locked.sock"
        free = stack.enter_context(
            EmbeddedRedis(extra={"unixsocket": str(sockets[0]), "bind": "127.0.0.1 ::1"})
        )
        locked = stack.enter_context(EmbeddedRedis(extra={"unixsocket": str(sockets[1])}))
        with redis.Redis(port=locked.port) as client:
            client.execute_command("ACL", "SETUSER", USER, "on", f">{PASSWORD}", "~*", "&*", "+@all")
            client.config_set("requirepass", PASSWORD)

        def end(tls: ssl.SSLContext, server: EmbeddedRedis = free, host: str = "127.0.0.1") -> TlsEnd:
            return stack.enter_context(TlsEnd(server.url, tls, host))

        yield Servers(
            certificates=made,
            free=free,
            locked=locked,
            socket=sockets[0],
            locked_socket=sockets[1],
            tls=end(made.server()),
            tls_6=end(made.server(), host="::1"),
            tls_locked=end(made.server(), locked),
            tls_other_name=end(made.server("redis.example.org")),
            tls_expired=end(made.server(expired=True)),
            tls_mutual=end(made.server(wants_client=True), locked),
            refusing=stack.enter_context(RefusingEnd(made.server(wants_client=True))),
        )
