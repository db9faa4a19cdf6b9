"""A line to Redis that understands what is said: the only place that counts commands and breaks in between.

Every worker has a line of its own, so a command says which process sent it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

from openagents_worker.store import scripts

__all__ = ["Command", "Proxy", "Verdict", "value_of"]

SCRIPTS = {
    getattr(scripts, name)().script.sha.encode(): name for name in scripts.__all__ if name[0].islower()
}
# What a worker asks whatever runs it has: its own beat, the rescue of others, and how a connection begins.
NOT_OF_A_RUN = {
    "register", "renew", "retire", "end_lease", "look", "alarm", "reclaim", "wake", "resend", "resend_unread",
    "auth", "client", "eval", "hello", "info", "ping", "script", "select", "subscribe", "time", "unsubscribe",
    "zrange",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a run; `number` counts from 1 since the proxy was told to count."""

    number: int
    name: str
    worker: str


Verdict = Callable[[Command], Awaitable[bool]]
"""Asked at a command; True: the command, or its answer, is lost and the connection is reset."""


async def _pass(_: Command) -> bool:
    return False


class Proxy:
    """Lines from workers to one Redis, on a loop in a thread of its own.

    `before` is asked when a command has arrived here, `after` when Redis has answered it.
    """

    def __init__(self, redis_url: str) -> None:
        parts = urlsplit(redis_url)
        self._redis = (parts.hostname or "", parts.port or 0)
        self.before: Verdict = _pass
        self.after: Verdict = _pass
        self.seen: list[Command] = []
        self.left_out: dict[str, int] = {}
        """Commands that are not of a run, by name."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="proxy")
        self._servers: list[asyncio.Server] = []
        self._lines: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def url_of(self, worker: str) -> str:
        """A new line for this worker."""
        return asyncio.run_coroutine_threadsafe(self._listen(worker), self._loop).result()

    def count(self, *, before: Verdict = _pass, after: Verdict = _pass) -> None:
        """Count from 1 again, and ask these."""
        self.seen, self.left_out = [], {}
        self.before, self.after = before, after

    def _main(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for line in self._lines:
            line.cancel()
        await asyncio.gather(
            *self._lines, *(server.wait_closed() for server in self._servers), return_exceptions=True
        )

    async def _listen(self, worker: str) -> str:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._line(worker, reader, writer), name=f"line of {worker}")
            self._lines.add(task)
            task.add_done_callback(self._lines.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self._servers.append(server)
        return f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"

    # --- one connection ----------------------------------------------------------------------------------

    async def _line(self, worker: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        ways: list[asyncio.Task[None]] = []
        try:
            from_redis, to_redis = await asyncio.open_connection(*self._redis)
            ends.append(to_redis)
            asked: deque[Command | None] = deque()
            ways.append(asyncio.create_task(self._commands(worker, asked, reader, to_redis)))
            ways.append(asyncio.create_task(self._answers(asked, from_redis, writer)))
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass  # Redis is gone: so is this line
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, *map(_reset, ends), return_exceptions=True)

    async def _commands(
        self,
        worker: str,
        asked: deque[Command | None],
        reader: asyncio.StreamReader,
        to_redis: asyncio.StreamWriter,
    ) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                raw, words = await _command(reader)
                command = self._counted(worker, words)
                if command is not None and await self.before(command):
                    return
                asked.append(command)
                to_redis.write(raw)
                await to_redis.drain()

    async def _answers(
        self, asked: deque[Command | None], from_redis: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                raw = await value_of(from_redis)
                command = asked.popleft() if asked else None  # a published message answers nothing
                if command is not None and await self.after(command):
                    return
                writer.write(raw)
                await writer.drain()

    def _counted(self, worker: str, words: list[bytes]) -> Command | None:
        name = words[0].decode().lower()
        if name == "evalsha":
            name = SCRIPTS.get(words[1], "an unknown script")
        if name in NOT_OF_A_RUN:
            self.left_out[name] = self.left_out.get(name, 0) + 1
            return None
        self.seen.append(Command(len(self.seen) + 1, name, worker))
        return self.seen[-1]


async def _reset(end: asyncio.StreamWriter) -> None:
    """Close with RST: whoever reads there gets an error and no end of file."""
    with suppress(OSError):
        end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.close()
        await end.wait_closed()


# --- RESP ------------------------------------------------------------------------------------------------


async def _command(reader: asyncio.StreamReader) -> tuple[bytes, list[bytes]]:
    """A command as it is on the wire, and its words."""
    head = await reader.readuntil(b"\r\n")
    raw, words = [head], []
    for _ in range(int(head[1:-2])):
        raw.append(await reader.readuntil(b"\r\n"))
        raw.append(await reader.readexactly(int(raw[-1][1:-2]) + 2))
        words.append(raw[-1][:-2])
    return b"".join(raw), words


async def value_of(reader: asyncio.StreamReader) -> bytes:
    """One answer of RESP 2 or 3, as it is on the wire."""
    head = await reader.readuntil(b"\r\n")
    kind, count = head[:1], head[1:-2]
    if kind in b"$=!":
        return head if int(count) < 0 else head + await reader.readexactly(int(count) + 2)
    items = {b"*": 1, b"~": 1, b">": 1, b"%": 2}.get(kind, 0) * max(int(count), 0) if kind in b"*~>%" else 0
    return b"".join([head, *[await value_of(reader) for _ in range(items)]])
