"""The network between a worker and Redis: the only place that stalls and cuts connections."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

__all__ = ["Network"]

CHUNK = 65_536


class Link:
    """The connections of one worker to Redis. All methods run on the event loop of the network."""

    def __init__(self, redis_port: int) -> None:
        self._redis_port = redis_port
        self._flows = asyncio.Event()
        self._flows.set()
        self._is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def stall(self) -> None:
        self._flows.clear()

    def cut(self) -> None:
        self._is_cut = True
        for writer in self._writers:
            _reset(writer)

    def heal(self) -> None:
        self._is_cut = False
        self._flows.set()

    def close(self) -> None:
        self.heal()
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            _reset(writer)
            return
        try:
            from_redis, to_redis = await asyncio.open_connection("127.0.0.1", self._redis_port)
        except OSError:
            _reset(writer)
            return
        both = {writer, to_redis}
        self._writers |= both
        try:
            directions = [
                asyncio.create_task(self._forward(reader, to_redis), name="to redis"),
                asyncio.create_task(self._forward(from_redis, writer), name="from redis"),
            ]
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
        finally:
            self._writers -= both
            for each in both:
                each.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, so that the other side gets an error and not the end of the stream."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Network:
    """One link per worker, on an event loop in a thread. A context manager."""

    def __init__(self, redis_port: int) -> None:
        self._redis_port = redis_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network")
        self._links: dict[str, Link] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def open(self, worker: str) -> str:
        """Open the link of this worker; returns the Redis URL that it uses."""
        return (
            f"redis://127.0.0.1:{asyncio.run_coroutine_threadsafe(self._open(worker), self._loop).result()}/0"
        )

    def stall(self, worker: str) -> None:
        """Transport nothing from now on. The connections stay open."""
        self._call(worker, Link.stall)

    def cut(self, worker: str) -> None:
        """Reset all connections, and refuse new ones from now on."""
        self._call(worker, Link.cut)

    def heal(self, worker: str) -> None:
        """End a stall or a cut."""
        self._call(worker, Link.heal)

    def close(self, worker: str) -> None:
        """Close the link of a worker that has ended."""
        self._call(worker, Link.close)

    def _call(self, worker: str, act: Callable[[Link], None]) -> None:
        if (link := self._links.get(worker)) is not None:
            self._loop.call_soon_threadsafe(act, link)

    async def _open(self, worker: str) -> int:
        link = self._links[worker] = Link(self._redis_port)
        return await link.listen()

    async def _close(self) -> None:
        for link in self._links.values():
            link.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
