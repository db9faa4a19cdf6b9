"""The server: the only place that listens, and that picks the entry a request is answered with."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import h11

from openagents_worker.llm.script import ReplyScript, ScriptedFault, ScriptedReply, read_entry
from openagents_worker.printable import printable
from openagents_worker.testing.model_server.answers import FAULTS, Answer, BeforePiece, Log
from openagents_worker.testing.model_server.anthropic_messages import AnthropicMessages
from openagents_worker.testing.model_server.connection import Connection, Hangup, HttpRequest
from openagents_worker.testing.model_server.openai_chat import OpenAIChat
from openagents_worker.testing.model_server.wire_format import ModelRequest, Unreadable, WireFormat, digest

__all__ = ["ModelServer", "ReplyFunction"]

BACKLOG = 2048  # a thousand clients may knock at once
CLIENT_GONE = 499  # logged for a reply that nobody was there to take; nginx's number for it

FORMATS: Mapping[str, WireFormat] = {wire.path: wire for wire in (OpenAIChat(), AnthropicMessages())}

ReplyFunction = Callable[[ModelRequest], Mapping[str, Any] | Awaitable[Mapping[str, Any]]]


class ModelServer:
    """The model. `reply` is a script (a list of entries) or a function from a request to one entry.

    A script answers turn n of a conversation with its n-th reply; the faults before that reply go to the
    first tries of the turn, told apart by `Idempotency-Key`, or by the messages where there is none.
    `latency_ms` passes before a reply, `token_delay_ms` between the pieces of a streamed one; in its place
    `before_piece(request, number)` is awaited before each piece, so that a test can hold a reply half-way.

    >>> with ModelServer([{"text": "hello"}]).serve_in_thread() as server:
    ...     server.url.endswith("/v1")
    True
    """

    def __init__(
        self,
        reply: ReplyFunction | Sequence[Mapping[str, Any]],
        *,
        port: int = 0,
        host: str = "127.0.0.1",
        latency_ms: int = 0,
        token_delay_ms: int = 0,
        before_piece: BeforePiece | None = None,
        log_path: str | Path | None = None,
        can_stream: bool = True,
    ) -> None:
        """`can_stream` False: replies come whole, also where a stream was asked for, as some servers do.

        Raises `PluginConfigError`, which names the index of the entry that cannot be used.
        """
        self.host, self.port = host, port
        self.connections = 0
        """How many were opened so far."""
        self._reply = reply if callable(reply) else _ScriptedReplies(reply)
        self._latency_ms = latency_ms
        self._before_piece = before_piece or _after(token_delay_ms / 1000)
        self._can_stream = can_stream
        self._log = Log(None if log_path is None else Path(log_path))
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)

    # --- life --------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """What goes into `llm.api_base`."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def log(self) -> list[dict[str, Any]]:
        """What happened so far: one `received` and one `answered` for every completion asked for."""
        return list(self._log.events)

    @property
    def open_connections(self) -> int:
        return len(self._tasks)

    async def start(self) -> None:
        self._log.open()
        try:
            self._server = await asyncio.start_server(self._connected, self.host, self.port, backlog=BACKLOG)
        except OSError:
            self._log.close()
            raise
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the port and every connection, answered or not."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await server.wait_closed()
        self._log.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @contextmanager
    def serve_in_thread(self) -> Iterator[Self]:
        """Serve on a loop in a thread of its own, for tests that have none or block theirs."""
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def serve() -> None:
            over = asyncio.Event()
            try:
                await self.start()
            except Exception as error:  # noqa: BLE001 - it is raised where the thread was started
                started.set_exception(error)
                return
            started.set_result((asyncio.get_running_loop(), over))
            await over.wait()
            await self.stop()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), name="model-server")
        thread.start()
        try:
            loop, over = started.result()
            try:
                yield self
            finally:
                loop.call_soon_threadsafe(over.set)
        finally:
            thread.join()

    # --- connections -------------------------------------------------------------------------------------

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._serve(Connection(reader, writer)), name="model-server connection")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: Connection) -> None:
        try:
            while (request := await connection.next_request()) is not None:
                await self._route(request, connection)
        except (OSError, h11.RemoteProtocolError, Hangup):
            pass  # the client is gone, or is to believe that we are
        finally:
            await connection.close()

    async def _route(self, request: HttpRequest, connection: Connection) -> None:
        match request.method, request.path:
            case "POST", path if path in FORMATS:
                await self._complete(request, connection, FORMATS[path])
            case "GET", "/v1/models":
                model = {"id": "scripted", "object": "model", "created": 0, "owned_by": "openagents-worker"}
                await connection.send_json(200, {"object": "list", "data": [model]})
            case "GET", "/log":
                await connection.send_json(200, self.log)
            case "GET", "/health":
                await connection.send_json(200, {"status": "ok"})
            case _:
                problem = f"no {request.method} {request.path} here"
                await connection.send_json(404, {"error": {"type": "not_found_error", "message": problem}})

    async def _complete(self, request: HttpRequest, connection: Connection, wire: WireFormat) -> None:
        number = next(self._ids)
        try:
            asked = wire.read(request)
        except Unreadable as problem:
            await connection.send_json(400, wire.error(400, str(problem), number), wire.headers(number))
            return
        asked = asked if self._can_stream else replace(asked, stream=False)
        answer = Answer(number, asked, wire, connection, self._log, self._before_piece)
        answer.log_received()
        try:
            entry = await self._entry(asked)
            latency_ms = self._latency_ms if entry.latency_ms is None else entry.latency_ms
            await asyncio.sleep(latency_ms / 1000)
            await answer.give(entry)
        except OSError:
            answer.log_answered(CLIENT_GONE)
            raise

    async def _entry(self, asked: ModelRequest) -> ScriptedReply | ScriptedFault:
        try:
            entry = self._reply(asked)
            if inspect.isawaitable(entry):
                entry = await entry
            if isinstance(entry, ScriptedReply | ScriptedFault):
                return entry
            return read_entry(entry, faults=FAULTS, where="the reply function's entry")
        except Exception as error:  # noqa: BLE001 - whatever a test's function raises, its client must hear of
            text = f"{type(error).__name__}: {error}"
            print(printable(f"model server: the reply function failed: {text}"), file=sys.stderr)
            return ScriptedFault(error="response", message=text)


def _after(pause_s: float) -> BeforePiece:
    async def pause(_: ModelRequest, __: int) -> None:
        await asyncio.sleep(pause_s)

    return pause


class _ScriptedReplies:
    """A script as a reply function; counts the tries of every turn of every conversation."""

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._script = ReplyScript(entries, faults=FAULTS)
        self._tries: Counter[str] = Counter()

    def __call__(self, asked: ModelRequest) -> Any:
        call = asked.headers.get("idempotency-key") or digest(asked.messages)
        entry = self._script.entry(asked.n, self._tries[call])
        self._tries[call] += isinstance(entry, ScriptedFault)
        if entry is None:
            return {"error": "response", "message": f"script ended after {len(self._script)} replies"}
        return entry
