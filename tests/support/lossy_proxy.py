"""A Redis behind a bad connection: a proxy that drops answers, closed ports, and silent ports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager

from tests.support.proxy import Line, Lines

Predicate = Callable[[bytes], bool]


class Proxy(Lines):
    """Forwards bytes to Redis and back, until it has to drop some. It has one port, `url`.

    `lose_answer_to`: the answer to such a request is read from Redis, thrown away, and the line is cut.
    `swallow`: such bytes from Redis never arrive, and nobody is told.
    """

    def __init__(self, redis_url: str) -> None:
        super().__init__(redis_url)
        self.url = ""
        self.lose_answer_to: Predicate = lambda _: False
        self.swallow: Predicate = lambda _: False
        self.lost = 0
        self._losing: set[asyncio.StreamReader] = set()
        self._open: set[asyncio.StreamReader] = set()
        self._silent: set[asyncio.StreamReader] = set()

    def opened(self) -> None:
        self.url = self.listen(self._requests, self._answers)

    async def _requests(self, line: Line) -> None:
        self._open.add(line.from_redis)
        while data := await line.from_client.read(65536):
            if line.from_redis in self._silent:
                continue
            if self.lose_answer_to(data):
                self._losing.add(line.from_redis)
            line.to_redis.write(data)
            await line.to_redis.drain()

    def silence(self) -> None:
        """From now on the open connections drop all bytes silently; new connections work."""
        self._silent.update(self._open)

    async def _answers(self, line: Line) -> None:
        while data := await line.from_redis.read(65536):
            if line.from_redis in self._losing:
                self.lost += 1
                return
            if line.from_redis not in self._silent and not self.swallow(data):
                line.to_client.write(data)
                await line.to_client.drain()


def closed_port() -> int:
    """A port without a listener."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@contextmanager
def silent_port() -> Generator[int]:
    """A port that accepts connections and never sends anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]
