"""Servers that speak stdio: the only place that starts their processes, and bounds what they write.

A server runs under `supervisor.py`, which kills all that it has started when it ends, when the connection is
closed, and when the worker dies. The transport of the SDK gives a server variables that its options do not
name, and reads lines of any length.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio

from openagents_worker.redaction import safe_message
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.builtin import supervisor
from openagents_worker.tools.mcp.sdk import Sdk
from openagents_worker.tools.mcp.streams import MAX_LOGGED, log_invalid_message, mend

__all__ = ["MAX_MESSAGE_BYTES", "ServerProcess", "stdio_transport"]

log = get_logger(__name__)

MAX_MESSAGE_BYTES = 8 * 1024 * 1024  # a result with an image; a larger one could not be recorded either
MAX_STDERR_LINE = 8 * 1024
MAX_STDERR_LINES = 200  # of one connection: a server that writes without end must not fill the log
KEPT_LINES = 5
MAX_LINES_WITHOUT_MESSAGE = 100_000
YIELD_LINES = 100
CLOSE_PATIENCE_S = 2.0  # for a server to end by itself when its stdin is closed, as the protocol asks
STDERR_PATIENCE_S = 0.5  # to read what is left in the pipe of a server that has ended
KILL_PATIENCE_S = 2 * supervisor.KILL_PATIENCE_S


@dataclass(slots=True)
class ServerProcess:
    """A program to start as a server. `env` is its whole environment."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str | None
    shown: str
    """Its name in the log."""
    problem: str | None = None
    """Why the connection cannot be used any more, if that is known."""
    last_lines: deque[bytes] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    """The last lines that it wrote to stderr."""
    pid: int | None = None

    @property
    def last_words(self) -> str:
        """The last lines that it wrote to stderr, masked."""
        return " | ".join(map(_shown, self.last_lines))


@asynccontextmanager
async def stdio_transport(server: ServerProcess, sdk: Sdk) -> AsyncIterator[tuple[Any, Any]]:
    """Start a server; the streams of its messages, as a session of the SDK takes them.

    Raises `OSError`. At the end no process is left that the server has started.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", supervisor.__file__, "serve", str(os.getpid()), *server.argv,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=dict(server.env), cwd=server.cwd, start_new_session=True, limit=MAX_MESSAGE_BYTES,
    )  # fmt: skip
    server.pid = process.pid
    stderr_read = anyio.Event()
    to_session, read = anyio.create_memory_object_stream[Any](0)
    write, from_session = anyio.create_memory_object_stream[Any](0)
    try:
        async with anyio.create_task_group() as tasks, to_session, read, write, from_session:
            tasks.start_soon(_read_messages, process, to_session, server, sdk)
            tasks.start_soon(_write_messages, process, from_session, to_session, sdk)
            tasks.start_soon(_read_stderr, process, server, stderr_read)
            try:
                yield read, write
            finally:
                await _until_stopped(process)
                with anyio.move_on_after(STDERR_PATIENCE_S, shield=True):
                    await stderr_read.wait()  # it often says why the server has ended
                tasks.cancel_scope.cancel()
    finally:
        await _until_stopped(process)


async def _read_messages(
    process: asyncio.subprocess.Process, to: Any, server: ServerProcess, sdk: Sdk
) -> None:
    """Give the session each message of the server. Ends with the server, or if it sends something else."""
    assert process.stdout is not None
    invalid = lines = 0  # lines since the last message
    async with to:
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            while line := await _line_of(process.stdout, server):
                lines += 1
                if lines % YIELD_LINES == 0:
                    await asyncio.sleep(0)  # lines that have arrived are read without a wait
                if lines > MAX_LINES_WITHOUT_MESSAGE:
                    server.problem = f"it sent {MAX_LINES_WITHOUT_MESSAGE:,} lines that are not messages"
                    return
                if not line.strip():
                    continue
                try:
                    message = sdk.parse(await mend(line))
                except ValueError:
                    invalid += 1
                    if invalid <= MAX_LOGGED + 1:
                        log_invalid_message(server.shown, invalid, _shown(line))
                    continue
                lines = 0
                await to.send(message)


async def _line_of(stream: asyncio.StreamReader, server: ServerProcess) -> bytes:
    """The next line; empty at the end."""
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as end:
        return end.partial
    except asyncio.LimitOverrunError:
        server.problem = f"it sent a message of more than {MAX_MESSAGE_BYTES:,} bytes"
    except OSError as error:
        server.problem = f"its output cannot be read: {error}"
    return b""


async def _write_messages(process: asyncio.subprocess.Process, messages: Any, to: Any, sdk: Sdk) -> None:
    assert process.stdin is not None
    async with messages:
        async for message in messages:
            try:
                process.stdin.write(json.dumps(sdk.to_json(message)).encode() + b"\n")
                await process.stdin.drain()
            except OSError:  # the server has ended
                await to.aclose()
                return


async def _read_stderr(
    process: asyncio.subprocess.Process, server: ServerProcess, at_end: anyio.Event
) -> None:
    """Log what the server writes to stderr: masked, and not more than a few lines."""
    assert process.stderr is not None
    lines = 0
    buffered = b""
    while piece := await process.stderr.read(MAX_STDERR_LINE):
        *whole, buffered = (buffered + piece).split(b"\n")
        if len(buffered) >= MAX_STDERR_LINE:
            whole, buffered = [*whole, buffered], b""
        for line in filter(bytes.strip, whole):
            server.last_lines.append(line)
            lines += 1
            if lines <= MAX_STDERR_LINES:
                log.info("mcp.server_stderr", server=server.shown, text=_shown(line))
            elif lines == MAX_STDERR_LINES + 1:
                log.warning("mcp.server_stderr_dropped", server=server.shown, lines=MAX_STDERR_LINES)
        await asyncio.sleep(0)  # pieces that have arrived are read without a wait
    if buffered.strip():
        server.last_lines.append(buffered)
    at_end.set()


def _shown(line: bytes) -> str:
    return safe_message(line[: 2 * MAX_STDERR_LINE].decode("utf-8", "replace").rstrip(), MAX_STDERR_LINE)


async def _until_stopped(process: asyncio.subprocess.Process) -> None:
    """Stop the server, also while this task is cancelled; then the cancellation travels on."""
    if process.returncode is not None:
        return
    stopping = asyncio.create_task(_stop(process), name="stop mcp server")
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not stopping.done():
            try:
                await asyncio.shield(stopping)
            except asyncio.CancelledError as error:
                if stopping.cancelled():
                    raise
                cancelled = error
    if cancelled is not None:
        raise cancelled


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Close stdin, as the protocol asks; then end the supervisor, which kills what is left."""
    assert process.stdin is not None
    process.stdin.close()
    for patience_s, end in ((CLOSE_PATIENCE_S, process.terminate), (KILL_PATIENCE_S, process.kill)):
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await _ended(process)
                return
        with suppress(ProcessLookupError):
            end()
    await _ended(process)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Wait until the process has ended. `wait` would also wait until all copies of its pipes are closed."""
    while process.returncode is None:  # noqa: ASYNC110 - asyncio has no event for it
        await asyncio.sleep(0.01)
    await process.wait()
