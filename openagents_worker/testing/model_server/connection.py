"""HTTP on the server's side: the only place that reads requests and writes bytes."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import h11

from openagents_worker.jsontext import dumps

__all__ = ["ClientConnection", "Hangup", "ReceivedRequest", "event_bytes"]

JSON = {"content-type": "application/json"}


class Hangup(Exception):
    """Raised to close the connection at once, even if the client still expects data."""


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    query: Mapping[str, str] = field(default_factory=dict)


class ClientConnection:
    """The connection of one client, with one request at a time. Raises `OSError` if the client is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.SERVER)

    async def next_request(self) -> ReceivedRequest | None:
        """Read the next request with its whole body. None: the client sends no more requests."""
        if self._http.states == {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
            self._http.start_next_cycle()
        head: h11.Request | None = None
        body = bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    await self._write(h11.InformationalResponse(status_code=100, headers=[]))
                self._http.receive_data(await self._reader.read(65536))
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                return _http_request(head, bytes(body))
            else:
                return None

    async def send_json(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        await self.send_body(status, dumps(value).encode("utf-8", "replace"), headers or {})

    async def send_body(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a reply with the content type of JSON; the body may be anything."""
        length = ("content-length", str(len(body)))
        await self._write(
            h11.Response(status_code=status, headers=[*{**JSON, **headers}.items(), length]),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )

    async def send_half(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a reply with the content length of the whole body, but only half of the body."""
        length = ("content-length", str(len(body)))
        await self._write(
            h11.Response(status_code=200, headers=[*{**JSON, **headers}.items(), length]),
            h11.Data(data=body[: len(body) // 2]),
        )

    async def begin_stream(self, headers: Mapping[str, str]) -> None:
        stream = {"content-type": "text/event-stream", "transfer-encoding": "chunked", **headers}
        await self._write(h11.Response(status_code=200, headers=list(stream.items())))

    async def send_event(self, data: str, name: str | None = None) -> None:
        await self.send_bytes(event_bytes(data, name))

    async def send_bytes(self, data: bytes) -> None:
        """Send bytes of the stream; they need not be an event."""
        await self._write(h11.Data(data=data))

    async def send_half_a_header(self) -> None:
        """Send the first line of a reply and the beginning of a header."""
        self._writer.write(b"HTTP/1.1 200 OK\r\ncontent-ty")
        await self._writer.drain()

    async def end_stream(self) -> None:
        await self._write(h11.EndOfMessage())

    async def client_gone(self) -> None:
        """Wait until the client closes its side."""
        await self._reader.read()

    def reset(self) -> None:
        """Close the connection with a TCP reset: the client gets "connection reset by peer"."""
        tcp = self._writer.get_extra_info("socket")
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        try:
            async with asyncio.timeout(1):  # the client may have stopped reading
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self._writer.transport.abort()

    async def _write(self, *events: h11.Event) -> None:
        data = b"".join(self._http.send(event) or b"" for event in events)
        if self._reader.at_eof():  # detects a killed client before the kernel reports it
            raise ConnectionResetError("the client is gone")
        self._writer.write(data)
        await self._writer.drain()


def event_bytes(data: str, name: str | None = None) -> bytes:
    """A server-sent event as it is sent."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {data}\n\n".encode("utf-8", "replace")


def _http_request(head: h11.Request, body: bytes) -> ReceivedRequest:
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
    path, _, query = head.target.decode("latin-1").partition("?")
    return ReceivedRequest(head.method.decode(), path, headers, body, dict(parse_qsl(query)))
