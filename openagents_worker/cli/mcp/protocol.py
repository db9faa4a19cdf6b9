"""The server side of MCP over stdio: the only place that reads and writes its messages.

JSON-RPC, a line for each message. Requests are answered concurrently; a notification cancels one of them.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from openagents_worker.errors import OpenAgentsError
from openagents_worker.jsontext import dumps, loads
from openagents_worker.redaction import safe_message
from openagents_worker.telemetry.logs import get_logger

__all__ = ["ToolRequest", "McpService", "StdioServer"]

log = get_logger(__name__)

VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
"""Versions of the protocol, the newest first. What this server uses of them is the same in all."""
MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_OPEN_REQUESTS = 1_000
MAX_WAITING_LINES = 8  # that were read, and are not handled yet
MAX_ERROR_CHARS = 2_000
PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603


class ProtocolError(Exception):
    """A request that is answered with an error of JSON-RPC."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """One call of a tool. `report` sends the client a text about its progress, if it wants that."""

    name: str
    arguments: Mapping[str, Any]
    meta: Mapping[str, Any]
    report: Callable[[str], Awaitable[None]]


class McpService(Protocol):
    """What the server offers."""

    instructions: str

    async def tools(self) -> list[dict[str, Any]]:
        """The tools as the protocol describes them."""
        ...

    async def call(self, asked: ToolRequest) -> dict[str, Any]:
        """The result of a tool. Raises `KeyError` for an unknown tool."""
        ...


@dataclass
class StdioServer:
    """Serves one client until its stdin ends."""

    service: McpService
    version: str
    reader: IO[bytes] = field(default_factory=lambda: sys.stdin.buffer)
    writer: IO[bytes] = field(default_factory=lambda: sys.stdout.buffer)

    def __post_init__(self) -> None:
        self._open: dict[str | int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writing = asyncio.Lock()

    async def serve(self) -> None:
        """Answer requests until the client closes the stream. Calls that are still open end with it."""
        lines: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING_LINES)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop, lines), name="mcp stdin", daemon=True).start()
        try:
            while line := await lines.get():
                await self._take(line)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _read(self, loop: asyncio.AbstractEventLoop, lines: asyncio.Queue[bytes]) -> None:
        """Read lines in a thread: stdin may be a file, which an event loop cannot wait for."""
        try:
            while True:
                line = self.reader.readline(MAX_LINE_BYTES + 1)
                asyncio.run_coroutine_threadsafe(lines.put(line), loop).result()
                if not line:
                    return
        except (RuntimeError, OSError, ValueError):  # the loop or the stream is closed
            return

    async def _take(self, line: bytes) -> None:
        """Handle one line: a request gets a task of its own."""
        try:
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"a message has at most {MAX_LINE_BYTES:,} bytes")
            message = loads(line)
        except (ValueError, RecursionError) as error:
            await self._send_error(None, PARSE_ERROR, f"not valid JSON: {error}")
            return
        if not isinstance(message, dict) or not isinstance(message.get("method"), str):
            if not (isinstance(message, dict) and "id" in message):  # a reply to a ping, which none awaits
                await self._send_error(None, INVALID_REQUEST, "not a request of JSON-RPC 2.0")
            return
        params = message.get("params")
        params = params if isinstance(params, dict) else {}
        id_ = message.get("id")
        if id_ is None:
            self._notified(message["method"], params)
        elif not isinstance(id_, str | int) or id_ in self._open or len(self._open) >= MAX_OPEN_REQUESTS:
            await self._send_error(id_, INVALID_REQUEST, "the id is in use, or too many requests are open")
        else:
            task = asyncio.create_task(self._answer(id_, message["method"], params), name="mcp request")
            self._open[id_] = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(lambda _: self._open.pop(id_, None))

    def _notified(self, method: str, params: Mapping[str, Any]) -> None:
        id_ = params.get("requestId")
        if method == "notifications/cancelled" and isinstance(id_, str | int):
            task = self._open.get(id_)
            if task is not None:
                task.cancel()

    async def _answer(self, id_: str | int, method: str, params: dict[str, Any]) -> None:
        try:
            result = await self._result(method, params)
        except asyncio.CancelledError:
            raise  # a cancelled request has no answer
        except ProtocolError as error:
            await self._send_error(id_, error.code, str(error))
        except OpenAgentsError as error:
            await self._send_error(id_, INTERNAL, f"{error.code}: {error}")
        except Exception as error:
            log.exception("mcp.request_failed", method=method)
            await self._send_error(id_, INTERNAL, f"{type(error).__name__}: {error}")
        else:
            await self._send({"jsonrpc": "2.0", "id": id_, "result": result})

    async def _result(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        match method:
            case "initialize":
                asked = params.get("protocolVersion")
                return {
                    "protocolVersion": asked if asked in VERSIONS else VERSIONS[0],
                    "capabilities": {"tools": {"listChanged": False}},
                    "serverInfo": {"name": "openagents-worker", "version": self.version},
                    "instructions": self.service.instructions,
                }
            case "ping":
                return {}
            case "tools/list":
                return {"tools": await self.service.tools()}
            case "tools/call":
                return await self._called(params)
        raise ProtocolError(NO_METHOD, f"there is no method {method[:100]!r}")

    async def _called(self, params: dict[str, Any]) -> dict[str, Any]:
        name, arguments = params.get("name"), params.get("arguments") or {}
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ProtocolError(INVALID_PARAMS, "tools/call needs 'name', a text, and 'arguments', an object")
        meta = params.get("_meta")
        meta = meta if isinstance(meta, dict) else {}
        try:
            return await self.service.call(ToolRequest(name, arguments, meta, self._reporter(meta)))
        except KeyError:
            raise ProtocolError(INVALID_PARAMS, f"there is no tool {name[:100]!r}") from None

    def _reporter(self, meta: Mapping[str, Any]) -> Callable[[str], Awaitable[None]]:
        token = meta.get("progressToken")
        count = 0

        async def report(message: str) -> None:
            nonlocal count
            if not isinstance(token, str | int):
                return
            count += 1
            params = {"progressToken": token, "progress": count, "message": message}
            await self._send({"jsonrpc": "2.0", "method": "notifications/progress", "params": params})

        return report

    async def _send_error(self, id_: Any, code: int, message: str) -> None:
        error = {"code": code, "message": safe_message(message, MAX_ERROR_CHARS)}
        await self._send(
            {"jsonrpc": "2.0", "id": id_ if isinstance(id_, str | int) else None, "error": error}
        )

    async def _send(self, message: Mapping[str, Any]) -> None:
        line = dumps(message).encode() + b"\n"
        async with self._writing:
            await asyncio.to_thread(self._write, line)

    def _write(self, line: bytes) -> None:
        try:
            self.writer.write(line)
            self.writer.flush()
        except (OSError, ValueError):  # the client has gone; the end of stdin ends the server
            return
