"""A proxy in front of a real Redis. The only place where tests intercept its connections.

It closes every connection and server that it opens.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

__all__ = ["Line", "Lines", "Stalled"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Line:
    """A connection of a client, and the connection to Redis that belongs to it."""

    from_client: asyncio.StreamReader
    to_client: asyncio.StreamWriter
    from_redis: asyncio.StreamReader
    to_redis: asyncio.StreamWriter


PassOn = Callable[[Line], Awaitable[None]]
"""Forwards bytes in one direction until the stream ends. Then the line is closed."""


class Lines:
    """Proxied connections to one Redis, on an event loop in a separate thread. A (sync or async) context.

    `resets`: lines are closed with RST, so the reader gets an error instead of the end of the stream.
    """

    resets = False
    host = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    """The TLS context of the server. None: clients connect without TLS."""

    def __init__(self, redis_url: str) -> None:
        parts = urlsplit(redis_url)
        self._redis = (parts.hostname or "", parts.port or 0)
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="proxy")
        self._started, self._over = threading.Event(), asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._lines: set[asyncio.Task[None]] = set()
        self._ends: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        self.opened()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.__exit__)

    def opened(self) -> None:
        """Called at the beginning of the block. Subclasses start to listen here."""

    def listen(self, *forwarders: PassOn) -> str:
        """Listen on a new port and return its URL. Each connection is served by these forwarders."""
        return self._run_on_loop(self._listen(forwarders))

    def hang_up(self) -> None:
        """Stop accepting connections."""
        if threading.get_ident() == self._thread.ident:
            self._stop_listening()
        else:
            self._run_on_loop(self._hang_up())

    def _run_on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- on the loop -------------------------------------------------------------------------------------

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._started.set()
        await self._over.wait()
        self._stop_listening()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for line in self._lines:
                line.cancel()
            await asyncio.wait(others)  # includes connections that are being accepted: they become lines next
            await asyncio.sleep(0)
        for server in self._servers:
            server.close()
        await asyncio.gather(*map(self._close, list(self._ends)))

    async def _hang_up(self) -> None:
        self._stop_listening()

    def _stop_listening(self) -> None:
        """Stop accepting. asyncio would leak connections that it is accepting while a server is closed."""
        for listening in [listening for server in self._servers for listening in server.sockets]:
            self._loop.remove_reader(listening.fileno())
            with suppress(OSError):  # it was done before
                listening.shutdown(socket.SHUT_RDWR)

    async def _listen(self, forwarders: tuple[PassOn, ...]) -> str:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._ends.add(writer)  # here, because a task that is cancelled at once never starts
            line = asyncio.create_task(self._pass_on(forwarders, reader, writer), name="line")
            self._lines.add(line)
            line.add_done_callback(self._lines.discard)

        server = await asyncio.start_server(connected, self.host, 0, ssl=self.tls)
        self._servers.append(server)
        scheme = "redis" if self.tls is None else "rediss"
        return f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"

    async def _pass_on(
        self, forwarders: tuple[PassOn, ...], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        passing: list[asyncio.Task[None]] = []
        ends = [writer]
        try:
            from_redis, to_redis = await asyncio.open_connection(*self._redis)
            self._ends.add(to_redis)
            ends.append(to_redis)
            line = Line(reader, writer, from_redis, to_redis)
            passing = [
                asyncio.create_task(_forward_until_closed(each, line), name="forwarder")
                for each in forwarders
            ]
            await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass  # Redis has closed the connection, so the line is closed, too
        finally:
            for task in passing:
                task.cancel()
            await asyncio.gather(*passing, *map(self._close, ends), return_exceptions=True)

    async def _close(self, end: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            if self.resets:
                linger = struct.pack("ii", 1, 0)
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            end.close()
            await end.wait_closed()
        self._ends.discard(end)


class Stalled(Lines):
    """Lines that forward nothing between `stall` and `go_on`."""

    def opened(self) -> None:
        self._goes_on = asyncio.Event()
        self._goes_on.set()
        self.url = self.listen(self._both_directions)

    def stall(self) -> None:
        self._loop.call_soon_threadsafe(self._goes_on.clear)

    def go_on(self) -> None:
        self._loop.call_soon_threadsafe(self._goes_on.set)

    async def _both_directions(self, line: Line) -> None:
        await asyncio.gather(
            self._one_direction(line.from_client, line.to_redis),
            self._one_direction(line.from_redis, line.to_client),
        )

    async def _one_direction(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            await self._goes_on.wait()
            writer.write(data)
            await writer.drain()


async def _forward_until_closed(forwarder: PassOn, line: Line) -> None:
    with suppress(OSError, asyncio.IncompleteReadError):
        await forwarder(line)
