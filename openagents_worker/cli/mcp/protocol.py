"""The server side of MCP over stdio: the only place that understands and answers its messages.

JSON-RPC, a line for each message. Requests are answered concurrently; a notification cancels one of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from openagents_worker.cli.mcp.pipes import (
    MessageReader,
    MessageWriter,
    RawReader,
    RawWriter,
    raw_stdin,
    raw_stdout,
)
from openagents_worker.concurrency import end_task
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
MAX_ERROR_CHARS = 2_000
FLUSH_S = 1.0  # for what is written when the server ends; clients wait 2 s or more before they kill it
PARSE_ERROR, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603


class ProtocolError(Exception):
    """A request that is answered with an error of JSON-RPC."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """One call of a tool. `report` sends the client a text about its progress, if it wants that.

    `is_withdrawn` is whether the client has cancelled the call: it is also cancelled when the client ends.
    """

    name: str
    arguments: Mapping[str, Any]
    meta: Mapping[str, Any]
    report: Callable[[str], Awaitable[None]]
    is_withdrawn: Callable[[], bool] = lambda: False


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
    """Serves one client until its stdin ends.

    `is_answered` is whether the client has got all answers that had begun when the server ended.
    """

    service: McpService
    version: str
    reader: RawReader = field(default_factory=raw_stdin)
    writer: RawWriter = field(default_factory=raw_stdout)
    is_answered: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self._open: dict[str | int, asyncio.Task[None]] = {}
        self._withdrawn: set[str | int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._output = MessageWriter(self.writer)

    async def serve(self) -> None:
        """Answer requests until the client closes the stream. Calls that are still open end with it.

        Ends in about `FLUSH_S` also if the client does not read its answers.
        """
        lines = MessageReader(self.reader, MAX_LINE_BYTES)
        lines.start()
        try:
            while line := await lines.next_line():
                await self._take(line)
        finally:
            self.is_answered = False
            await asyncio.gather(*map(end_task, list(self._tasks)))
            self.is_answered = await self._output.flush(FLUSH_S)

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
            task.add_done_callback(lambda _: self._forget(id_))

    def _notified(self, method: str, params: Mapping[str, Any]) -> None:
        id_ = params.get("requestId")
        if method == "notifications/cancelled" and isinstance(id_, str | int):
            task = self._open.get(id_)
            if task is not None:
                self._withdrawn.add(id_)
                task.cancel()

    def _forget(self, id_: str | int) -> None:
        self._open.pop(id_, None)
        self._withdrawn.discard(id_)

    async def _answer(self, id_: str | int, method: str, params: dict[str, Any]) -> None:
        try:
            result = await self._result(id_, method, params)
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

    async def _result(self, id_: str | int, method: str, params: dict[str, Any]) -> dict[str, Any]:
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
                return await self._called(id_, params)
        raise ProtocolError(NO_METHOD, f"there is no method {method[:100]!r}")

    async def _called(self, id_: str | int, params: dict[str, Any]) -> dict[str, Any]:
        name, arguments = params.get("name"), params.get("arguments") or {}
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise ProtocolError(INVALID_PARAMS, "tools/call needs 'name', a text, and 'arguments', an object")
        meta = params.get("_meta")
        meta = meta if isinstance(meta, dict) else {}
        asked = ToolRequest(name, arguments, meta, self._reporter(meta), lambda: id_ in self._withdrawn)
        try:
            return await self.service.call(asked)
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
        await self._output.write(dumps(message).encode() + b"\n")
