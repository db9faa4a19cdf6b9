"""Answers: the only place that gives a reply or a fault to one request, and that writes both into the log."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from openagents_worker.jsontext import dumps
from openagents_worker.llm.script import ScriptedFault, ScriptedReply
from openagents_worker.testing.model_server.connection import Connection, Hangup
from openagents_worker.testing.model_server.wire_format import Event, ModelRequest, Reply, WireFormat

__all__ = ["FAULTS", "Answer", "BeforePiece", "Log"]

FAULTS = {
    "bad_json": "200 with a body that is no JSON",
    "connection": "the connection is closed without a reply",
    "cut_stream": "a stream that ends without saying that it is done",
    "disconnect": "the connection is closed in the middle of the reply",
    "hang": "no reply, until the client gives up",
    "rate_limit": "429",
    "response": "400",
    "server_error": "500",
}
"""The values of an entry's `error`; `status` replaces the status of the last three."""

BeforePiece = Callable[[ModelRequest, int], Awaitable[object]]
"""Awaited before each piece of a streamed reply; pieces are counted from 0."""

STATUS = {"rate_limit": 429, "response": 400, "server_error": 500}
TORN = ScriptedReply(text="This reply is torn before it is whole.")


class Log:
    """What was asked and answered, in memory and, line by line as it happens, in a file."""

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
    """The answer to one completion request, logged before its last bytes leave."""

    def __init__(
        self,
        number: int,
        asked: ModelRequest,
        wire: WireFormat,
        connection: Connection,
        log: Log,
        before_piece: BeforePiece,
    ) -> None:
        self._number, self._asked, self._wire = number, asked, wire
        self._connection, self._log = connection, log
        self._before_piece = before_piece
        self._logged = False
        self._headers = wire.headers(number)

    def log_received(self) -> None:
        asked = self._asked
        self._log.write(
            event="received",
            id=self._number,
            call=asked.headers.get("x-call"),
            key=asked.headers.get("idempotency-key"),
            model=asked.model,
            messages=list(asked.messages),
            tools=[tool.get("function", {}).get("name") for tool in asked.tools],
            stream=asked.stream,
        )

    def log_answered(self, status: int | None) -> None:
        """Once an answer; `status` None: the connection was closed without one."""
        if not self._logged:
            self._logged = True
            self._log.write(event="answered", id=self._number, status=status)

    async def give(self, entry: ScriptedReply | ScriptedFault) -> None:
        if isinstance(entry, ScriptedFault):
            await self._fail(entry)
        elif self._asked.stream:
            await self._stream(self._reply(entry))
        else:
            self.log_answered(200)
            await self._connection.send_json(200, self._wire.whole(self._reply(entry)), self._headers)

    def _reply(self, entry: ScriptedReply) -> Reply:
        return Reply(self._number, int(time.time()), self._asked, entry)

    # --- streams -----------------------------------------------------------------------------------------

    async def _stream(self, reply: Reply) -> None:
        *ending, last = self._wire.closing(reply)
        await self._begin(reply, self._wire.pieces(reply))
        for event in ending:
            await self._connection.send_event(*event)
        self.log_answered(200)
        await self._connection.send_event(*last)
        await self._connection.end_stream()

    async def _begin(self, reply: Reply, pieces: Iterable[Event]) -> None:
        await self._connection.begin_stream(self._headers)
        for event in self._wire.opening(reply):
            await self._connection.send_event(*event)
        for number, event in enumerate(pieces):
            await self._before_piece(self._asked, number)
            await self._connection.send_event(*event)

    # --- faults ------------------------------------------------------------------------------------------

    async def _fail(self, fault: ScriptedFault) -> None:
        match fault.error:
            case "connection":
                self.log_answered(None)
                raise Hangup
            case "hang":
                await self._connection.client_gone()
                raise ConnectionResetError
            case "bad_json":
                body = self._torn_body()
                self.log_answered(200)
                await self._connection.send_body(200, body[: len(body) // 2], self._headers)
            case "disconnect" | "cut_stream" if self._asked.stream:
                await self._tear_stream(hang_up=fault.error == "disconnect")
            case "disconnect" | "cut_stream":
                self.log_answered(200)
                await self._connection.send_half(self._torn_body(), self._headers)
                raise Hangup
            case _:
                await self._refuse(fault)

    def _torn_body(self) -> bytes:
        return dumps(self._wire.whole(self._reply(TORN))).encode()

    async def _tear_stream(self, *, hang_up: bool) -> None:
        reply = self._reply(TORN)
        pieces = list(self._wire.pieces(reply))
        await self._begin(reply, pieces[: len(pieces) // 2])
        self.log_answered(200)
        if hang_up:
            raise Hangup
        await self._connection.end_stream()

    async def _refuse(self, fault: ScriptedFault) -> None:
        status = fault.status or STATUS[fault.error]
        headers = dict(self._headers)
        if fault.retry_after_ms is not None:
            seconds = math.ceil(fault.retry_after_ms / 1000)
            headers |= {"retry-after-ms": str(fault.retry_after_ms), "retry-after": str(seconds)}
        self.log_answered(status)
        body = self._wire.error(status, fault.message or f"scripted {fault.error}", self._number)
        await self._connection.send_json(status, body, headers)
