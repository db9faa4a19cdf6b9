"""One connection to an MCP server: the only place that opens, uses and closes it.

One task opens the connection, keeps it, and closes it: the cancel scopes of anyio belong to a task. Calls are
made from other tasks. A call that fails says whether the server can have executed it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from openagents_worker.redaction import safe_message
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.mcp.http import (
    KEY,
    SESSION_GONE,
    SESSION_MAY_BE_GONE,
    HttpFailure,
    client_factory,
    request_key,
    trusted_certificates,
)
from openagents_worker.tools.mcp.options import ServerOptions
from openagents_worker.tools.mcp.sdk import McpMessage, RequestFailed, Sdk, load_sdk
from openagents_worker.tools.mcp.stdio import ServerProcess, stdio_transport
from openagents_worker.tools.mcp.streams import ObservedReader, ObservedWriter, log_invalid_message

__all__ = ["McpConnection", "ConnectionFailed", "McpEndpoint"]

log = get_logger(__name__)

CLOSE_TIMEOUT_S = 20.0  # a server is killed after a few seconds; then this is only for the system
CANCEL_TIMEOUT_S = 2.0
PING_TIMEOUT_S = 5.0  # for a server that has left a call without an answer
MAX_TEXT = 500
NOT_STREAMABLE = frozenset({400, 404, 405, 406})  # the server may speak the older protocol, SSE


@dataclass(eq=False)
class ConnectionFailed(Exception):
    """A connection was not opened, or was lost. `may_have_run`: the server may have executed the call."""

    reason: str
    may_have_run: bool = False
    status: int | None = None
    retry_after_ms: int | None = None
    is_final: bool = False
    """Whether the same call would fail again, as its answer is too large."""

    def __str__(self) -> str:
        return self.reason

    @property
    def is_gone(self) -> bool:
        """Whether a new connection can make the call."""
        return self.status in (None, SESSION_GONE) and not self.is_final


@dataclass(frozen=True, slots=True)
class McpEndpoint:
    """A server with all that is needed to connect: `argv` and `env` of a process, or headers."""

    options: ServerOptions
    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


class McpConnection:
    """A connection that is open from `open` to `close`, or until it is lost."""

    def __init__(self, endpoint: McpEndpoint) -> None:
        self.endpoint = endpoint
        self.shown = endpoint.options.shown
        self.capabilities: dict[str, Any] = {}
        self.has_changed_tools = False
        """Whether the server has said that its list of tools is another one now."""
        self.when_tools_change: Callable[[], object] = lambda: None
        """Called when it says so."""
        self.pid: int | None = None
        self._sdk: Sdk
        self._session: Any = None
        self._process: ServerProcess | None = None
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_ready = False
        self._closing = asyncio.Event()
        self._problem: ConnectionFailed | None = None
        self._last_failure: HttpFailure | None = None
        self._waiting: dict[str, asyncio.Future[HttpFailure]] = {}
        """The calls that wait for their results, by key."""
        self._requests = 0
        self._sent: dict[str, Any] = {}
        """The ids of the requests of these calls that were handed to the transport."""
        self._invalid_messages = 0
        self._is_doubted = self._is_silent = self._is_sse = self._is_mute = False
        self._pinging: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        return self._session is not None and not (self._closing.is_set() or self._lost.is_set())

    async def answers(self) -> bool:
        """Whether the connection can be used for another call.

        A server may hang, or may have been restarted and reject all requests with status 400. So it gets a
        ping first if a call was given up or rejected, and nothing was answered since then. Not while other
        calls wait for their answers: a server may make one call after the other.
        """
        if self._pinging is None and self._is_doubted and not (self._is_silent or self._waiting):
            self._pinging = asyncio.create_task(self._ping(), name="mcp ping", context=Context())
        if self._pinging is not None:
            await asyncio.wait({self._pinging})
        return self.is_open and not (self._is_silent or self._is_mute)

    async def _ping(self) -> None:
        try:
            with suppress(TimeoutError, ConnectionFailed, RequestFailed):
                async with asyncio.timeout(PING_TIMEOUT_S):
                    await self.request("ping")
        finally:
            self._is_silent = self._is_doubted
            self._pinging = None

    # --- open and close ----------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect. Raises `ConnectionFailed`; the caller closes it then as well."""
        self._sdk = await asyncio.to_thread(load_sdk)
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # An empty context: the connection does not belong to the run that opens it.
        self._task = asyncio.create_task(self._keep(ready), name=f"mcp {self.shown}", context=Context())
        limit_s = self.endpoint.options.init_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.shield(ready)
        except TimeoutError:
            text = f"the MCP server {self.shown} was not ready within {limit_s:g} s{self._lines()}"
            raise ConnectionFailed(text) from None

    async def close(self) -> None:
        """Close the connection. Afterwards no process of the server is left."""
        self._closing.set()
        if self._pinging is not None:
            await _ended(self._pinging)
        task = self._task
        if task is None:
            return
        for cancel in (False, True):
            if cancel or not self._is_ready:
                task.cancel()  # while it connects, nothing else ends the task
            done, _ = await asyncio.wait({task}, timeout=CLOSE_TIMEOUT_S)
            if done:
                return
        log.error("mcp.not_closed", server=self.shown)

    async def _keep(self, ready: asyncio.Future[None]) -> None:
        """Open the connection, and keep it until it is to be closed or is lost."""
        problem: ConnectionFailed | None = None
        try:
            problem = await self._connected(ready)
        except asyncio.CancelledError:
            raise
        except BaseExceptionGroup as group:
            problem = self._failed(_first(group))
        except Exception as error:  # noqa: BLE001 - the SDK and the transports raise anything
            problem = self._failed(error)
        finally:
            self._session = None
            self._problem = problem or ConnectionFailed(f"the connection to {self.shown} is closed")
            if not ready.done():
                ready.set_exception(self._problem)
                ready.exception()  # nobody may be waiting any more
            elif problem is not None:
                log.warning("mcp.connection_lost", server=self.shown, error=problem.reason)

    async def _connected(self, ready: asyncio.Future[None]) -> ConnectionFailed | None:
        async with AsyncExitStack() as stack:
            session = await self._open_session(stack)
            self._session, self._is_ready = session, True
            if not ready.done():
                ready.set_result(None)
            closing = asyncio.create_task(self._closing.wait(), name="mcp closing")
            lost = asyncio.create_task(self._lost.wait(), name="mcp lost")
            try:
                await asyncio.wait({closing, lost}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                closing.cancel()
                lost.cancel()
            self._session = None
            if self._closing.is_set():
                return None
        return self._failed(None)

    async def _open_session(self, stack: AsyncExitStack) -> Any:
        """The session, agreed upon with the server. A server that speaks only SSE is asked again that way."""
        options = self.endpoint.options
        if options.transport != "auto" or options.url is None:
            return await self._session_over(stack, options.transport)
        trying = AsyncExitStack()
        try:
            async with trying:
                session = await self._session_over(trying, "streamable_http")
                stack.push_async_exit(trying.pop_all())
                return session
        except BaseException as error:
            status = self._last_failure.status if self._last_failure is not None else None
            if isinstance(error, asyncio.CancelledError) or status not in NOT_STREAMABLE:
                raise
        self._last_failure = None
        return await self._session_over(stack, "sse")

    async def _session_over(self, stack: AsyncExitStack, transport: str) -> Any:
        read, write = await stack.enter_async_context(self._transport(transport))
        self._lost, self._is_sse = asyncio.Event(), transport == "sse"
        tapped = ObservedWriter(write, self._note_sent), ObservedReader(read, self._lost)
        session = await stack.enter_async_context(self._sdk.session(tapped[1], tapped[0], self._on_message))
        self.capabilities = await self._sdk.initialize(session)
        return session

    @asynccontextmanager
    async def _transport(self, kind: str) -> AsyncIterator[tuple[Any, Any]]:
        options = self.endpoint.options
        if options.url is None:
            self._process = ServerProcess(self.endpoint.argv, self.endpoint.env, options.cwd, self.shown)
            async with stdio_transport(self._process, self._sdk) as streams:
                self.pid = self._process.pid
                yield streams
            return
        certificates = await asyncio.to_thread(trusted_certificates)
        make_client = client_factory(self._sdk.httpx, self.endpoint.headers, certificates, self._on_failure)
        if kind == "sse":
            async with self._sdk.sse(options.url, make_client) as streams:
                yield streams[0], streams[1]
            return
        async with make_client() as client, self._sdk.streamable_http(options.url, client) as streams:
            yield streams[0], streams[1]

    # --- requests ----------------------------------------------------------------------------------------

    async def call(self, name: str, arguments: dict[str, Any], key: str) -> dict[str, Any]:
        """The result of a tool as the protocol has it. `key` is the idempotency key of the call.

        Raises `RequestFailed` if the server answers with an error, and `ConnectionFailed`. If this task is
        cancelled, the server gets a notification.
        """
        return await self._request("tools/call", {"name": name, "arguments": arguments}, key)

    async def request(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of another request, which changes nothing. Raises as `call`."""
        self._requests += 1
        return await self._request(method, params, f"request {self._requests}")

    async def _request(self, method: str, params: dict[str, Any], key: str) -> dict[str, Any]:
        message = McpMessage(method=method, params={**params, "_meta": {KEY: key}})
        session = self._session
        if session is None or not self.is_open:
            raise self._problem or ConnectionFailed(f"the connection to {self.shown} is closed")
        failure: asyncio.Future[HttpFailure] = asyncio.get_running_loop().create_future()
        self._waiting[key] = failure
        # In an empty context: version 2 of the SDK starts tasks of the connection in that of the caller, and
        # a run that is cancelled would take them with it.
        asking = asyncio.create_task(
            self._sdk.request(session, message), name="mcp request", context=Context()
        )
        assert self._task is not None
        try:
            waited: set[asyncio.Future[Any]] = {asking, failure, self._task}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done() and not failure.done():
                await asyncio.wait({asking}, timeout=0)  # the end of the connection ends its requests
            return self._outcome(asking, failure, key)
        except asyncio.CancelledError:
            self._is_doubted = True
            self._cancel_at_server(key)
            raise
        finally:
            self._waiting.pop(key, None)
            self._sent.pop(key, None)
            failure.cancel()
            await _ended(asking)

    def _outcome(
        self, asking: asyncio.Task[dict[str, Any]], failure: asyncio.Future[HttpFailure], key: str
    ) -> dict[str, Any]:
        """The result of a request. Raises `RequestFailed` or `ConnectionFailed`."""
        if failure.done():
            seen = failure.result()
            reason = f"the MCP server {self.shown} has failed: {seen.reason}"
            raise ConnectionFailed(reason, seen.may_have_run, seen.status, seen.retry_after_ms, seen.is_final)
        error = asking.exception() if asking.done() and not asking.cancelled() else None
        if asking.done() and error is None and not asking.cancelled():
            self._is_doubted = self._is_silent = False
            return asking.result()
        if isinstance(error, RequestFailed) and not error.is_closed:
            self._is_doubted = self._is_silent = False
            raise error
        if isinstance(error, RequestFailed) and self.is_open:  # only this answer was lost
            reason = f"the MCP server {self.shown} has failed: {safe_message(error.message, MAX_TEXT)}"
            raise ConnectionFailed(reason, may_have_run=key in self._sent)
        problem = self._problem or self._failed(None if isinstance(error, RequestFailed) else error)
        raise ConnectionFailed(problem.reason, may_have_run=key in self._sent, is_final=problem.is_final)

    def _cancel_at_server(self, key: str) -> None:
        """Notify the server that nobody waits for a call any more. Version 2 of the SDK does that itself."""
        id_, session = self._sent.get(key), self._session
        if id_ is None or session is None or self._sdk.is_second:
            return

        async def notify() -> None:
            with suppress(Exception):
                async with asyncio.timeout(CANCEL_TIMEOUT_S):
                    params = {"requestId": id_, "reason": "the call was cancelled"}
                    await session.send_notification(
                        McpMessage(method="notifications/cancelled", params=params)
                    )

        task = asyncio.create_task(notify(), name="mcp cancel", context=Context())
        _notifying.add(task)
        task.add_done_callback(_notifying.discard)

    # --- what the session sees ---------------------------------------------------------------------------

    def _note_sent(self, message: Any) -> None:
        sent = self._sdk.to_json(message)
        if (key := request_key(sent)) is not None and key in self._waiting:
            self._sent[key] = sent.get("id")

    def _on_failure(self, failure: HttpFailure) -> None:
        waiting = self._waiting.get(failure.key) if failure.key is not None else None
        if waiting is not None and not waiting.done():
            waiting.set_result(failure)
        self._is_doubted |= failure.status == SESSION_MAY_BE_GONE
        self._is_mute |= self._is_sse  # the SDK sends nothing more; answers to earlier calls still come
        # An answer that is too large is the failure of its call. Others may use the connection.
        is_lost = failure.status in (None, SESSION_GONE) and not failure.is_final
        if is_lost or not self._is_ready:
            self._last_failure = failure
        if is_lost and self._session is not None:
            self._session = None  # the next call opens a new one
            self._lost.set()

    async def _on_message(self, message: Any) -> None:
        if isinstance(message, Exception):
            self._invalid_messages += 1
            log_invalid_message(self.shown, self._invalid_messages, safe_message(str(message), MAX_TEXT))
        elif self._sdk.is_list_change(message):
            self.has_changed_tools = True
            self.when_tools_change()

    def _failed(self, error: BaseException | None) -> ConnectionFailed:
        """Why the connection is lost, as far as it is known."""
        if (failure := self._last_failure) is not None:
            reason, status, delay_ms = failure.reason, failure.status, failure.retry_after_ms
            is_final = failure.is_final
        else:
            status = delay_ms = None
            problem = self._process.problem if self._process is not None else None
            is_final = problem is not None
            has_ended = error is None or (isinstance(error, RequestFailed) and error.is_closed)
            reason = problem or ("it has ended" if has_ended else _text_of(error))
        text = f"the MCP server {self.shown} cannot be used: {reason}{self._lines()}"
        if self._process is not None and not self._is_ready and "PATH" not in self.endpoint.env:
            text += "; its environment has no PATH, which many programs need: name it in env_passthrough"
        return ConnectionFailed(text, status=status, retry_after_ms=delay_ms, is_final=is_final)

    def _lines(self) -> str:
        """The last lines of its stderr, for error messages."""
        words = "" if self._process is None else self._process.last_words
        return f" (stderr: {safe_message(words, MAX_TEXT)})" if words else ""


_notifying: set[asyncio.Task[None]] = set()
"""Tasks that notify servers of cancelled calls. asyncio itself keeps no reference to a task."""


async def _ended(task: asyncio.Task[Any]) -> None:
    """Cancel a task that is not needed any more, and take its exception."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _text_of(error: BaseException | None) -> str:
    if isinstance(error, OSError) and error.strerror:
        return safe_message(error.strerror, MAX_TEXT)
    return safe_message(f"{type(error).__name__}: {error}".removesuffix(": "), MAX_TEXT)
