"""A Redis behind a bad line: a proxy that loses answers, and ports where nobody is or nobody speaks."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

Predicate = Callable[[bytes], bool]


class Proxy:
    """Passes bytes on to Redis and back, until it is told to lose some.

    `lose_answer_to`: the answer to such a request is read from Redis, thrown away, and the line is cut.
    `swallow`: such bytes from Redis never arrive, and nobody is told.
    """

    def __init__(self, redis_url: str) -> None:
        self._target = (urlsplit(redis_url).hostname or "", urlsplit(redis_url).port or 0)
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._server.getsockname()[1]}/0"
        self.lose_answer_to: Predicate = lambda _: False
        self.swallow: Predicate = lambda _: False
        self.lost = 0
        self._silent: set[socket.socket] = set()
        self._lines: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Proxy:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        for line in self._lines:
            _cut(line)
        for thread in self._threads:
            thread.join(5)

    def silence(self) -> None:
        """From now on nothing passes on the lines that are open, and nobody is told; new ones work."""
        self._silent.update(self._lines)

    def hang_up(self) -> None:
        """From now on nobody gets a new connection."""
        _cut(self._server)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._server.accept()
                redis = socket.create_connection(self._target)
                self._lines += [client, redis]
                losing = threading.Event()
                for one in (self._requests, self._answers):
                    thread = threading.Thread(target=one, args=(client, redis, losing), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _requests(self, client: socket.socket, redis: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if client in self._silent:
                    continue
                if self.lose_answer_to(data):
                    losing.set()
                redis.sendall(data)
        _cut(redis)

    def _answers(self, client: socket.socket, redis: socket.socket, losing: threading.Event) -> None:
        with suppress(OSError):
            while data := redis.recv(65536):
                if losing.is_set():
                    self.lost += 1
                    break
                if client not in self._silent and not self.swallow(data):
                    client.sendall(data)
        _cut(client)


def _cut(line: socket.socket) -> None:
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
    line.close()


def closed_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@contextmanager
def silent_port() -> Generator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]
