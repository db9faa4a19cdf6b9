"""Answers: the only place that sends a reply or a fault for a request, and logs both."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TextIO

from openagents_worker.jsontext import dumps
from openagents_worker.llm.script import ScriptedFault, ScriptedReply
from openagents_worker.testing.model_server.connection import ClientConnection, Hangup, event_bytes
from openagents_worker.testing.model_server.wire_format import Event, ModelServerRequest, Reply, WireFormat

__all__ = ["BREAKS_REPLY", "FAULTS", "Answer", "BeforePiece", "RequestLog"]

FAULTS = {
    "bad_json": "200 with a body that is not valid JSON",
    "connection": "the connection is closed without a reply",
    "cut_stream": "a stream that ends before its last events",
    "disconnect": "the connection is closed in the middle of the reply",
    "error_in_200": "200 with a body, or in a stream an event, that reports an error",
    "garbage": "200 with bytes that are neither text nor JSON, in a stream an event that is not JSON",
    "half_character": "a reply whose text ends in the middle of a UTF-8 character",
    "hang": "no reply, until the client gives up",
    "overloaded": "529",
    "rate_limit": "429",
    "reset": "the connection is reset in the middle of the reply",
    "response": "400",
    "server_error": "500",
    "slow_body": "half of the reply, then nothing until the client gives up",
    "slow_headers": "half of the headers, then nothing until the client gives up",
    "wrong_content_type": "200 with a page of HTML, as a login page or a proxy sends it",
}
"""The values of an entry's `error`; `status` replaces the status of those that have one."""

BeforePiece = Callable[[ModelServerRequest, int], Awaitable[object]]
"""Awaited before each piece of a streamed reply, with the number of the piece, from 0."""

STATUS_BY_FAULT = {"overloaded": 529, "rate_limit": 429, "response": 400, "server_error": 500}
BREAKS_REPLY = frozenset({"cut_stream", "disconnect", "reset", "slow_body"})
"""The faults that break a reply after its beginning. In the background it is generated nevertheless."""

INCOMPLETE_REPLY = ScriptedReply(text="This reply is torn before it is whole.")
HALF_A_CHARACTER = ScriptedReply(text="This reply ends in half a character: 💡")
LAMP = "💡".encode()
GARBAGE = b"\x00\xff\xfe garbage {]"
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in.</body></html>"


EVENTS_BEFORE_BREAK = 6  # of a stream from the background: enough for its id and its first text


class BackgroundReply(Protocol):
    """A reply that is generated in the background."""

    def state(self) -> dict[str, Any]: ...

    def follow(self) -> AsyncIterator[Event]: ...


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
        request: ModelServerRequest,
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
            await self._stream(self.reply(entry))
        else:
            self.log_answered(200)
            await self._connection.send_json(200, self._wire.whole(self.reply(entry)), self._headers)

    async def send_background(self, started: BackgroundReply, fault: str | None) -> None:
        """Send the events of a response in the background, or its state. `fault`: what breaks the stream."""
        if not self._request.stream:
            self.log_answered(200)
            await self._connection.send_json(200, started.state(), self._headers)
            return
        await self._connection.begin_stream(self._headers)
        sent = 0
        async for event in started.follow():
            if fault is not None and sent == EVENTS_BEFORE_BREAK:
                self.log_answered(200)
                await self._break_stream(fault)
                return
            await self._connection.send_event(*event)
            sent += 1
        self.log_answered(200)
        await self._connection.end_stream()

    def reply(self, entry: ScriptedReply) -> Reply:
        """The reply to this request with the content of a scripted entry."""
        return Reply(self._number, int(time.time()), self._request, entry)

    # --- streams -----------------------------------------------------------------------------------------

    async def _stream(self, reply: Reply) -> None:
        *ending, last = self._wire.closing(reply)
        await self._send_begin_of_stream(reply, self._wire.pieces(reply))
        for event in ending:
            await self._connection.send_event(*event)
        self.log_answered(200)
        await self._connection.send_event(*last)
        await self._connection.end_stream()

    async def _send_begin_of_stream(self, reply: Reply, pieces: Iterable[Event]) -> None:
        """Send the headers, the opening events and these pieces. The stream stays open."""
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
            case "hang" | "slow_headers":
                if fault.error == "slow_headers":
                    await self._connection.send_half_a_header()
                await self._connection.client_gone()
                raise ConnectionResetError
            case "bad_json":
                body = self._incomplete_body()
                self.log_answered(200)
                await self._connection.send_body(200, body[: len(body) // 2], self._headers)
            case error if error in BREAKS_REPLY:
                await self._send_incomplete(error)
            case "garbage" | "error_in_200" | "half_character" | "wrong_content_type":
                self.log_answered(200)
                await self._send_unusable(fault)
            case _:
                await self._send_error(fault)

    async def _send_incomplete(self, fault: str) -> None:
        """Send half of a reply, and break off as the fault says."""
        if self._request.stream:
            reply = self.reply(INCOMPLETE_REPLY)
            pieces = list(self._wire.pieces(reply))
            await self._send_begin_of_stream(reply, pieces[: len(pieces) // 2])
            self.log_answered(200)
            await self._break_stream(fault)
            return
        self.log_answered(200)
        await self._connection.send_half(self._incomplete_body(), self._headers)
        await self._break_off(fault)

    async def _break_stream(self, fault: str) -> None:
        if fault == "cut_stream":
            await self._connection.end_stream()
        else:
            await self._break_off(fault)

    async def _break_off(self, fault: str) -> None:
        """End the connection, at once or (`slow_body`) when the client gives up."""
        if fault == "slow_body":
            await self._connection.client_gone()
            raise ConnectionResetError
        if fault == "reset":
            self._connection.reset()
        raise Hangup

    async def _send_unusable(self, fault: ScriptedFault) -> None:
        """Send an answer with status 200 that has no usable reply."""
        match fault.error:
            case "wrong_content_type":
                await self._connection.send_body(200, PAGE, {**self._headers, "content-type": "text/html"})
            case "half_character" if self._request.stream:
                reply = self.reply(HALF_A_CHARACTER)
                await self._connection.begin_stream(self._headers)
                for event in (
                    *self._wire.opening(reply),
                    *self._wire.pieces(reply),
                    *self._wire.closing(reply),
                ):
                    await self._connection.send_bytes(_with_half_a_character(event_bytes(*event)))
                await self._connection.end_stream()
            case "half_character":
                body = dumps(self._wire.whole(self.reply(HALF_A_CHARACTER))).encode()
                await self._connection.send_body(200, _with_half_a_character(body), self._headers)
            case "garbage" if self._request.stream:
                await self._send_begin_of_stream(self.reply(INCOMPLETE_REPLY), ())
                await self._connection.send_bytes(b"data: " + GARBAGE + b"\n\n")
                await self._connection.end_stream()
            case "garbage":
                await self._connection.send_body(200, GARBAGE, self._headers)
            case _:
                await self._send_error_in_200(fault.message or "scripted error")

    async def _send_error_in_200(self, message: str) -> None:
        reply = self.reply(INCOMPLETE_REPLY)
        if not self._request.stream:
            await self._connection.send_json(200, self._wire.failed(reply, message), self._headers)
            return
        pieces = list(self._wire.pieces(reply))
        half = pieces[: len(pieces) // 2]
        await self._send_begin_of_stream(reply, half)
        before = len(list(self._wire.opening(reply))) + len(half)
        await self._connection.send_event(*self._wire.failed_event(reply, message, before))
        await self._connection.end_stream()

    def _incomplete_body(self) -> bytes:
        return dumps(self._wire.whole(self.reply(INCOMPLETE_REPLY))).encode()

    async def _send_error(self, fault: ScriptedFault) -> None:
        status = fault.status or STATUS_BY_FAULT[fault.error]
        headers = dict(self._headers)
        if fault.retry_after_ms is not None:
            seconds = math.ceil(fault.retry_after_ms / 1000)
            headers |= {"retry-after-ms": str(fault.retry_after_ms), "retry-after": str(seconds)}
        self.log_answered(status)
        body = self._wire.error(status, fault.message or f"scripted {fault.error}", self._number)
        await self._connection.send_json(status, body, headers)


def _with_half_a_character(data: bytes) -> bytes:
    return data.replace(LAMP, LAMP[:2])
