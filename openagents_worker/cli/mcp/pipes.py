"""Pipes: the only place that reads and writes the bytes of an MCP client.

A client may send nothing for hours, and may stop reading. So a thread reads and another one writes. Both are
daemons, and use no lock of Python's standard streams: a process that ends waits for neither of them.
"""

from __future__ import annotations

import asyncio
import io
import select
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Protocol

__all__ = ["MessageReader", "MessageWriter", "RawReader", "RawWriter", "raw_stdin", "raw_stdout"]

CHUNK_BYTES = 64 * 1024
MAX_WAITING_LINES = 8  # that were read, and are not handled yet


class RawReader(Protocol):
    """A stream without a buffer. `read` returns None if it would have to wait, and b"" at the end."""

    def read(self, size: int, /) -> bytes | None: ...

    def fileno(self) -> int: ...


class RawWriter(Protocol):
    """A stream without a buffer. `write` returns how much it has taken; None if it would have to wait."""

    def write(self, data: memoryview, /) -> int | None: ...

    def fileno(self) -> int: ...


def raw_stdin() -> RawReader:
    """Standard input without a buffer. An interpreter that ends aborts if a thread reads from `sys.stdin`."""
    return io.FileIO(sys.stdin.fileno(), closefd=False)


def raw_stdout() -> RawWriter:
    """Standard output without a buffer. See `raw_stdin`."""
    return io.FileIO(sys.stdout.fileno(), "w", closefd=False)


class MessageReader:
    """Reads lines in a thread: stdin may be a file, which an event loop cannot wait for."""

    def __init__(self, stream: RawReader, max_line_bytes: int) -> None:
        self._stream = stream
        self._max_line_bytes = max_line_bytes
        self._lines: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING_LINES)

    def start(self) -> None:
        """Begin to read. Call it in the event loop that reads the lines."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), name="mcp stdin", daemon=True).start()

    async def next_line(self) -> bytes:
        """The next line; empty at the end of the stream. A line that is too long comes in pieces.

        Each piece but the last one has one byte more than a line may have.
        """
        return await self._lines.get()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError, OSError, ValueError):  # the loop or the stream is closed
            for line in self._split():
                asyncio.run_coroutine_threadsafe(self._lines.put(line), loop).result()
            asyncio.run_coroutine_threadsafe(self._lines.put(b""), loop).result()

    def _split(self) -> Iterator[bytes]:
        rest = bytearray()
        while chunk := self._chunk():
            begin = len(rest)  # no line ends before
            rest += chunk
            while (end := rest.find(b"\n", begin) + 1) or len(rest) > self._max_line_bytes:
                end = min(end or len(rest), self._max_line_bytes + 1)
                yield bytes(rest[:end])
                del rest[:end]
                begin = 0
        if rest:
            yield bytes(rest)

    def _chunk(self) -> bytes | None:
        """What has come; empty at the end of the stream."""
        while (chunk := self._stream.read(CHUNK_BYTES)) is None:  # the client has made the pipe non-blocking
            select.select([self._stream], [], [])
        return chunk


class MessageWriter:
    """Writes lines in a thread, one after the other. A line that has begun is never cut."""

    def __init__(self, stream: RawWriter) -> None:
        self._stream = stream
        self._lines: SimpleQueue[tuple[bytes, Future[None]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    async def write(self, line: bytes) -> None:
        """Returns when the pipe has taken the line, or when the client has gone.

        A line that has not begun when the caller is cancelled is not written.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mcp stdout", daemon=True)
            self._thread.start()
        written: Future[None] = Future()
        self._lines.put((line, written))
        await asyncio.wrap_future(written)

    async def flush(self, at_most_s: float) -> bool:
        """Wait for the lines that were passed before; returns whether they are written."""
        if self._thread is None:
            return True
        try:
            await asyncio.wait_for(self.write(b""), at_most_s)
        except TimeoutError:
            return False
        return True

    def _run(self) -> None:
        while True:
            line, written = self._lines.get()
            if written.set_running_or_notify_cancel():
                with suppress(OSError, ValueError):  # the client has gone; the end of stdin ends the server
                    self._write(line)
                written.set_result(None)

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            count = self._stream.write(rest)
            if count is None:  # the client has made the pipe non-blocking
                select.select([], [self._stream], [])
            else:
                rest = rest[count:]
