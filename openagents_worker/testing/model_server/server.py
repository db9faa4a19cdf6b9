"""The server: the only place that listens for connections, and selects the scripted entry for a request."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import re
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
from openagents_worker.testing.model_server.answers import (
    BREAKS_REPLY,
    FAULTS,
    Answer,
    BeforePiece,
    RequestLog,
)
from openagents_worker.testing.model_server.anthropic_messages import AnthropicMessagesFormat
from openagents_worker.testing.model_server.background import BackgroundResponses
from openagents_worker.testing.model_server.connection import ClientConnection, Hangup, ReceivedRequest
from openagents_worker.testing.model_server.listening import Listening
from openagents_worker.testing.model_server.openai_chat import OpenAIChatFormat
from openagents_worker.testing.model_server.openai_responses import OpenAIResponsesFormat
from openagents_worker.testing.model_server.wire_format import (
    InvalidRequest,
    ModelServerRequest,
    WireFormat,
    conversation_digest,
)

__all__ = ["ModelServer", "ReplyFunction", "call_of"]

BACKLOG = 2048  # a thousand clients may connect at the same time
CLIENT_GONE = 499  # nginx's status for a client that closed the connection before the reply

RESPONSES = OpenAIResponsesFormat()
FORMATS: Mapping[str, WireFormat] = {
    wire.path: wire for wire in (OpenAIChatFormat(), AnthropicMessagesFormat(), RESPONSES)
}
ONE_RESPONSE = re.compile(f"{re.escape(RESPONSES.path)}/([^/]+)(/cancel)?")

_FALLBACK = re.compile(r":fallback-\d+\Z")
_METHODS = {None: "GET", "/cancel": "POST"}

ReplyFunction = Callable[[ModelServerRequest], Mapping[str, Any] | Awaitable[Mapping[str, Any]]]


class ModelServer:
    """The model server. `reply` is a script (a list of entries) or a function from a request to one entry.

    A script answers turn n of a conversation with its n-th reply. The faults before that reply are used for
    the first tries of the turn. Tries of a call are recognised by `Idempotency-Key`, or by the messages of
    a request without this header; those of a fallback belong to its call. `latency_ms` passes before a reply,
    `token_delay_ms` between the pieces of a streamed one. `before_piece(request, number)`, if set, is awaited
    before each piece instead, so that a test can pause a reply. A function of a background
    response that breaks is called again for the reply itself.

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
    ) -> None:
        """Raises `PluginConfigError` that names the indexes of invalid entries."""
        self.host, self.port = host, port
        self.can_stream = True
        """False: replies are never streamed, even on request. Some real servers do this."""
        self._reply = reply if callable(reply) else _ScriptedReplies(reply)
        self._latency_ms = latency_ms
        self._before_piece = before_piece or _pause_before_piece(token_delay_ms / 1000)
        self._log = RequestLog(None if log_path is None else Path(log_path))
        self._background = BackgroundResponses(RESPONSES, self._before_piece, self._log)
        self._listening = Listening(self._serve, name="model-server connection")
        self._ids = itertools.count(1)

    # --- life --------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The value for `llm.api_base`."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def log(self) -> list[dict[str, Any]]:
        """The events so far: one `received` and one `answered` for every completion request."""
        return list(self._log.events)

    @property
    def connections(self) -> int:
        """The number of connections that were opened so far."""
        return self._listening.accepted

    @property
    def open_connections(self) -> int:
        return self._listening.open

    async def start(self) -> None:
        self._log.open()
        try:
            await self._listening.start(self.host, self.port, backlog=BACKLOG)
        except OSError:
            self._log.close()
            raise
        self.port = self._listening.port

    async def stop(self) -> None:
        """Close the port and every connection, answered or not."""
        if not self._listening.is_started:
            return
        await self._listening.stop()
        await self._background.stop()
        self._log.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @contextmanager
    def serve_in_thread(self) -> Iterator[Self]:
        """Serve on an event loop in another thread, for tests without an event loop or with a blocked one."""
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

        async def serve() -> None:
            stopping = asyncio.Event()
            try:
                await self.start()
            except Exception as error:  # noqa: BLE001 - it is raised where the thread was started
                started.set_exception(error)
                return
            started.set_result((asyncio.get_running_loop(), stopping))
            await stopping.wait()
            await self.stop()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), name="model-server")
        thread.start()
        try:
            loop, stopping = started.result()
            try:
                yield self
            finally:
                loop.call_soon_threadsafe(stopping.set)
        finally:
            thread.join()

    # --- connections -------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = ClientConnection(reader, writer)
        try:
            while (request := await connection.next_request()) is not None:
                await self._route(request, connection)
        except (OSError, h11.RemoteProtocolError, Hangup):
            pass  # the client has closed the connection, or a fault closes it
        finally:
            await connection.close()

    async def _route(self, request: ReceivedRequest, connection: ClientConnection) -> None:
        """Answer one HTTP request."""
        match request.method, request.path:
            case "POST", path if path in FORMATS:
                await self._answer_completion(request, connection, FORMATS[path])
            case "GET", "/v1/models":
                model = {"id": "scripted", "object": "model", "created": 0, "owned_by": "openagents-worker"}
                await connection.send_json(200, {"object": "list", "data": [model]})
            case "GET", "/log":
                await connection.send_json(200, self.log)
            case "GET", "/health":
                await connection.send_json(200, {"status": "ok"})
            case method, path if (one := ONE_RESPONSE.fullmatch(path)) and method == _METHODS[one.group(2)]:
                if one.group(2) is None:
                    await self._background.retrieve(one.group(1), request, connection)
                else:
                    await self._background.cancel(one.group(1), connection)
            case _:
                problem = f"no {request.method} {request.path} here"
                await connection.send_json(404, {"error": {"type": "not_found_error", "message": problem}})

    async def _answer_completion(
        self, request: ReceivedRequest, connection: ClientConnection, wire: WireFormat
    ) -> None:
        number = next(self._ids)
        try:
            model_request = wire.read(request)
        except InvalidRequest as problem:
            await connection.send_json(400, wire.error(400, str(problem), number), wire.headers(number))
            return
        model_request = model_request if self.can_stream else replace(model_request, stream=False)
        answer = Answer(number, model_request, wire, connection, self._log, self._before_piece)
        answer.log_received()
        try:
            entry = await self._entry(model_request)
            latency_ms = self._latency_ms if entry.latency_ms is None else entry.latency_ms
            if wire is RESPONSES and model_request.body.get("background") and _is_generated(entry):
                await self._answer_in_background(entry, answer, model_request, latency_ms / 1000)
                return
            await asyncio.sleep(latency_ms / 1000)
            await answer.send(entry)
        except OSError:
            answer.log_answered(CLIENT_GONE)
            raise

    async def _answer_in_background(
        self,
        entry: ScriptedReply | ScriptedFault,
        answer: Answer,
        request: ModelServerRequest,
        latency_s: float,
    ) -> None:
        """Start a response, and answer with its stream or its state. A fault breaks only the stream."""
        fault = entry.error if isinstance(entry, ScriptedFault) else None
        failure = None
        if isinstance(entry, ScriptedFault) and entry.error == "error_in_200":
            fault, failure = None, entry.message or "scripted error"
            entry = ScriptedReply(text="This response fails.")
        while isinstance(entry, ScriptedFault):  # the response has the reply that follows the faults
            entry = await self._entry(request)
        started = self._background.start(answer.reply(entry), latency_s=latency_s, failure=failure)
        await answer.send_background(started, fault)

    async def _entry(self, request: ModelServerRequest) -> ScriptedReply | ScriptedFault:
        try:
            entry = self._reply(request)
            if inspect.isawaitable(entry):
                entry = await entry
            if isinstance(entry, ScriptedReply | ScriptedFault):
                return entry
            return read_entry(entry, faults=FAULTS, where="the reply function's entry")
        except Exception as error:  # noqa: BLE001 - the client gets any error of the test's function
            text = f"{type(error).__name__}: {error}"
            print(printable(f"model server: the reply function failed: {text}"), file=sys.stderr)
            return ScriptedFault(error="response", message=text)


def _is_generated(entry: ScriptedReply | ScriptedFault) -> bool:
    """Whether a response in the background has an id and a state, in spite of a fault."""
    return isinstance(entry, ScriptedReply) or entry.error in BREAKS_REPLY or entry.error == "error_in_200"


def _pause_before_piece(pause_s: float) -> BeforePiece:
    async def pause(_: ModelServerRequest, __: int) -> None:
        await asyncio.sleep(pause_s)

    return pause


def call_of(request: ModelServerRequest) -> str:
    """What the tries of a call have in common, also those of its fallbacks, whose keys differ at the end."""
    key = request.headers.get("idempotency-key", "")
    return _FALLBACK.sub("", key) or conversation_digest(request.messages)


class _ScriptedReplies:
    """A script as a reply function. It counts the tries of every call."""

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._script = ReplyScript(entries, faults=FAULTS)
        self._tries: Counter[str] = Counter()

    def __call__(self, request: ModelServerRequest) -> Any:
        call = call_of(request)
        entry = self._script.entry(request.n, self._tries[call])
        self._tries[call] += isinstance(entry, ScriptedFault)
        if entry is None:
            return {"error": "response", "message": f"the script has ended after {len(self._script)} replies"}
        return entry
