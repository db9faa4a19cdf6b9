"""Answers: the only place that sends a reply or a fault for a request, and logs both."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from openagents_worker.jsontext import dumps
from openagents_worker.llm.script import ScriptedFault, ScriptedReply
from openagents_worker.testing.model_server.connection import ClientConnection, Hangup
from openagents_worker.testing.model_server.wire_format import Event, ModelRequest, Reply, WireFormat

__all__ = ["Answer", "BeforePiece", "FAULTS", "RequestLog"]

FAULTS = {
    "bad_json": "200 with a body that is not valid JSON",
    "connection": "the connection is closed without a reply",
    "cut_stream": "a stream that ends without a finish reason",
    "disconnect": "the connection is closed in the middle of the reply",
    "hang": "no reply, until the client gives up",
    "rate_limit": "429",
    "response": "400",
    "server_error": "500",
}
"""The values of an entry's `error`; `status` replaces the status of the last three."""

BeforePiece = Callable[[ModelRequest, int], Awaitable[object]]
"""Awaited before each piece of a streamed reply, with the number of the piece, from 0."""

STATUS_BY_FAULT = {"rate_limit": 429, "response": 400, "server_error": 500}
INCOMPLETE_REPLY = ScriptedReply(text="This reply is torn before it is whole.")


class RequestLog:
    """The log of requests and answers, in memory and (one JSON line per event) in a file."""

    def __init__(self, path: Path | None) -> None:
        self.events: list[dict[str, Any]] = []
        self._path = path
        self._file: TextIO | None = None

    def open(self) -> None:
        if self._path is not None:
            self._file = self._path.open("a", encoding="utf-8", errors="replace")

    def write(self, **event: Any) -> None:
        self.events.append({**event, "at": time.time()})
        if self._file is not None:
            self._file.write(dumps(self.events[-1]) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Answer:
    """The answer to one completion request. It is logged before its last bytes are sent."""

    def __init__(
        self,
        number: int,
        request: ModelRequest,
        wire: WireFormat,
        connection: ClientConnection,
        log: RequestLog,
        before_piece: BeforePiece,
    ) -> None:
        self._number, self._request, self._wire = number, request, wire
        self._connection, self._log = connection, log
        self._before_piece = before_piece
        self._logged = False
        self._headers = wire.headers(number)

    def log_received(self) -> None:
        request = self._request
        self._log.write(
            event="received",
            id=self._number,
            call=request.headers.get("x-call"),
            key=request.headers.get("idempotency-key"),
            model=request.model,
            messages=list(request.messages),
            tools=[tool.get("function", {}).get("name") for tool in request.tools],
            stream=request.stream,
        )

    def log_answered(self, status: int | None) -> None:
        """Log the answer, once. `status` None: the connection was closed without a reply."""
        if not self._logged:
            self._logged = True
            self._log.write(event="answered", id=self._number, status=status)

    async def send(self, entry: ScriptedReply | ScriptedFault) -> None:
        """Send the scripted reply or fault, and log it."""
        if isinstance(entry, ScriptedFault):
            await self._send_fault(entry)
        elif self._request.stream:
            await self._stream(self._reply(entry))
        else:
            self.log_answered(200)
            await self._connection.send_json(200, self._wire.whole(self._reply(entry)), self._headers)

    def _reply(self, entry: ScriptedReply) -> Reply:
        return Reply(self._number, int(time.time()), self._request, entry)

    # --- streams -----------------------------------------------------------------------------------------

    async def _stream(self, reply: Reply) -> None:
        *ending, last = self._wire.closing(reply)
        await self._begin_stream(reply, self._wire.pieces(reply))
        for event in ending:
            await self._connection.send_event(*event)
        self.log_answered(200)
        await self._connection.send_event(*last)
        await self._connection.end_stream()

    async def _begin_stream(self, reply: Reply, pieces: Iterable[Event]) -> None:
        await self._connection.begin_stream(self._headers)
        for event in self._wire.opening(reply):
            await self._connection.send_event(*event)
        for number, event in enumerate(pieces):
            await self._before_piece(self._request, number)
            await self._connection.send_event(*event)

    # --- faults ------------------------------------------------------------------------------------------

    async def _send_fault(self, fault: ScriptedFault) -> None:
        match fault.error:
            case "connection":
                self.log_answered(None)
                raise Hangup
            case "hang":
                await self._connection.client_gone()
                raise ConnectionResetError
            case "bad_json":
                body = self._incomplete_body()
                self.log_answered(200)
                await self._connection.send_body(200, body[: len(body) // 2], self._headers)
            case "disconnect" | "cut_stream" if self._request.stream:
                await self._send_incomplete_stream(hang_up=fault.error == "disconnect")
            case "disconnect" | "cut_stream":
                self.log_answered(200)
                await self._connection.send_half(self._incomplete_body(), self._headers)
                raise Hangup
            case _:
                await self._send_error(fault)

    def _incomplete_body(self) -> bytes:
        return dumps(self._wire.whole(self._reply(INCOMPLETE_REPLY))).encode()

    async def _send_incomplete_stream(self, *, hang_up: bool) -> None:
        reply = self._reply(INCOMPLETE_REPLY)
        pieces = list(self._wire.pieces(reply))
        await self._begin_stream(reply, pieces[: len(pieces) // 2])
        self.log_answered(200)
        if hang_up:
            raise Hangup
        await self._connection.end_stream()

    async def _send_error(self, fault: ScriptedFault) -> None:
        status = fault.status or STATUS_BY_FAULT[fault.error]
        headers = dict(self._headers)
        if fault.retry_after_ms is not None:
            seconds = math.ceil(fault.retry_after_ms / 1000)
            headers |= {"retry-after-ms": str(fault.retry_after_ms), "retry-after": str(seconds)}
        self.log_answered(status)
        body = self._wire.error(status, fault.message or f"scripted {fault.error}", self._number)
        await self._connection.send_json(status, body, headers)
