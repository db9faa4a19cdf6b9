"""Responses in the background: the only place that continues a call of an earlier attempt at the provider.

With `llm.background`, the provider generates a response whether or not anybody is connected. Its id is
stored before anything else is read (`CallInfo.note`). If the worker dies or the run moves to another worker,
the next attempt of the call asks for this response instead of sending a second request, which would be paid
for twice. A call that is given up is cancelled at the provider.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from openagents_worker.errors import LLMConnectionError, LLMError, LLMRateLimitError, OpenAgentsError
from openagents_worker.http_replies import with_translated_errors
from openagents_worker.llm.base import Delta, DeltaKind, LLMResponse, ModelRequest, current_call
from openagents_worker.llm.codec import StreamReader
from openagents_worker.llm.current_call import ids_of_call
from openagents_worker.llm.endpoints import with_query
from openagents_worker.llm.http import HttpModelClient
from openagents_worker.llm.reading import Exchange
from openagents_worker.telemetry.logs import get_logger

__all__ = ["BackgroundModelClient"]

log = get_logger(__name__)

MAX_RECONNECTS = 5
"""Lost connections and busy replies in a row, without an event or a state between them, before a try
fails."""
LONGEST_WAIT_MS = 30_000
"""A busy server that asks for a longer wait ends the try: the run may wait without a worker."""
RECONNECT_S = 0.5  # before the second one; it doubles with each
CANCEL_S = 3.0  # longest wait for the provider to take note that a call is cancelled
STATES_IN_PROGRESS = ("queued", "in_progress")
STATES_WITHOUT_OUTPUT = ("failed", "cancelled")


@dataclass(slots=True)
class _Running:
    """The response that a call waits for."""

    response_id: str | None = None
    sequence_number: int = -1
    """The number of the last event that was read."""
    reader: StreamReader | None = field(default=None, repr=False)
    """What has read these events: it knows the numbers of the calls, and what is in the middle of a text."""
    news: int = 0
    """How many new events and states were read."""
    is_from_before: bool = False
    """Whether an earlier attempt has created it."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The headers of every request for it, with the key."""

    def exists(self) -> bool:
        return self.response_id is not None

    def count(self, reply: StreamReader) -> None:
        """Count the event that was read last. A server may send those of before again."""
        self.reader = reply
        number = getattr(reply, "sequence_number", -1)
        if number > self.sequence_number:
            self.sequence_number = number
            self.news += 1

    def forget(self) -> None:
        """The next try creates a new response."""
        self.response_id, self.sequence_number, self.reader = None, -1, None


_running: ContextVar[_Running | None] = ContextVar("openagents_background_response", default=None)


class _Gone(Exception):
    """The provider does not know the response."""


class _Busy(Exception):
    """The provider cannot say now what has become of the response."""

    def __init__(self, error: LLMError) -> None:
        super().__init__(error.message)
        self.error = error


@contextmanager
def _logged_failure(response_id: str | None) -> Iterator[None]:
    """Log that a response could not be cancelled: it will cost something, and nobody gets it."""
    try:
        yield
    except (OpenAgentsError, httpx.HTTPError, TimeoutError) as error:
        log.warning("llm.cancel_failed", **ids_of_call(), response_id=response_id, error=type(error).__name__)


class BackgroundModelClient(HttpModelClient):
    """A client whose responses are generated in the background, if `poll_ms` is set."""

    poll_ms: int | None = None
    """Milliseconds between two requests for the state of a response that is not streamed. None: no response
    is generated in the background."""

    async def respond(self, request: ModelRequest) -> LLMResponse:
        if self.poll_ms is None:
            return await super().respond(request)
        running = self._noted()
        token = _running.set(running)
        try:
            return await super().respond(request)
        except asyncio.CancelledError:
            await self._cancel_if_given_up(running)
            raise
        finally:
            _running.reset(token)

    def is_sent_already(self) -> bool:
        running = _running.get()
        return running is not None and running.exists()

    # --- notes -------------------------------------------------------------------------------------------

    def _noted(self) -> _Running:
        """The response that an earlier attempt of this call has created at this provider, if there is one."""
        call = current_call.get()
        name = None if call is None or call.noted is None else self._response_id(call.noted)
        if call is None or name is None:
            return _Running()
        log.info("llm.response_continued", run_id=call.run_id, response_id=name)
        return _Running(name, is_from_before=True)

    def _response_id(self, note: Mapping[str, Any]) -> str | None:
        """The id in a note; None if the note is of another provider."""
        name = note.get("response_id") if note.get("api") == self._api else None
        return name if isinstance(name, str) and name else None

    @property
    def _api(self) -> str:
        """Identifies the provider in a note. The URL may contain a key, so only its hash is stored."""
        return hashlib.sha256(self.url.encode("utf-8", "replace")).hexdigest()[:16]

    def has_noted(self, note: Mapping[str, Any]) -> bool:
        return self._response_id(note) is not None

    async def _begin(self, running: _Running, name: str, model: str) -> None:
        """Store the id of a response before anything of it is used, and the model that writes it."""
        running.response_id, running.is_from_before = name, False
        call = current_call.get()
        if call is not None and call.note is not None:
            await call.note({"response_id": name, "api": self._api, "model": model})

    # --- one try -----------------------------------------------------------------------------------------

    async def _reply_body(self, exchange: Exchange) -> Any:
        """The body of the response: of the one that exists, or else of a new one."""
        running = _running.get()
        if running is None:
            return await super()._reply_body(exchange)
        running.headers = exchange.request_headers or {}
        if running.exists():
            with suppress(_Gone):
                body = await self._existing(exchange, running)
                if not (running.is_from_before and body.get("status") in STATES_WITHOUT_OUTPUT):
                    return self._ended(body, running)
            running.forget()
        try:
            return self._ended(await self._created_and_ended(exchange, running), running)
        except _Gone as gone:  # not yet: the next try asks again
            problem = "the provider does not know the response that it has created"
            raise LLMConnectionError(f"{self.provider_name}: {problem}") from gone

    async def _created_and_ended(self, exchange: Exchange, running: _Running) -> Any:
        """The body of a new response, after it has ended."""
        try:
            body = await self._created(exchange, running)
            if body.get("status") not in STATES_IN_PROGRESS:
                return body
        except httpx.TransportError:
            if not running.exists():
                raise
        return await self._existing(exchange, running)

    def _ended(self, body: Mapping[str, Any], running: _Running) -> Mapping[str, Any]:
        """The body of a response that has ended. After a failed one, the next try creates a new one."""
        if body.get("status") in STATES_WITHOUT_OUTPUT:
            running.forget()
        return body

    async def _created(self, exchange: Exchange, running: _Running) -> Any:
        """Create a response, note its id, and read what the provider sends."""

        async def note_id(reply: StreamReader) -> None:
            name = getattr(reply, "response_id", None)
            if running.response_id is None and name:
                await self._begin(running, name, exchange.body["model"])
            running.count(reply)

        exchange.after_chunk, exchange.reader = note_id, None
        body = await super()._reply_body(exchange)
        if running.response_id is None and isinstance(body.get("id"), str):
            await self._begin(running, body["id"], exchange.body["model"])
        return body

    async def _existing(self, exchange: Exchange, running: _Running) -> Any:
        """Read a response that exists: the events after the last one, or its state until it has ended."""
        lost = 0
        while True:
            before = running.news
            try:
                if exchange.is_streamed:
                    body = await self._continued(exchange, running)
                    if body.get("status") not in STATES_IN_PROGRESS:
                        return body  # otherwise the server cannot stream it, and has sent its state
                return await self._polled(exchange, running)
            except (httpx.TransportError, _Busy) as problem:
                busy = problem.error if isinstance(problem, _Busy) else None
                wait_ms = (busy and busy.retry_after_ms) or 0
                lost = 0 if running.news > before and not wait_ms else lost + 1
                if lost > MAX_RECONNECTS or wait_ms > LONGEST_WAIT_MS:
                    if busy is not None:
                        raise busy from problem
                    raise
                await self._timing.sleep(max(RECONNECT_S * 2**lost if lost else 0, wait_ms / 1000))

    async def _continued(self, exchange: Exchange, running: _Running) -> Any:
        query: dict[str, Any] = {"stream": "true"}
        if running.sequence_number >= 0:
            query["starting_after"] = running.sequence_number
        exchange.reader = running.reader if running.sequence_number >= 0 else None

        async def count(reply: StreamReader) -> None:
            running.count(reply)

        exchange.after_chunk = count
        return await self._get(exchange, running, query)

    async def _polled(self, exchange: Exchange, running: _Running) -> Any:
        assert self.poll_ms is not None
        while True:
            body = await self._get(exchange, running, {}, is_state=True)
            running.news += 1
            if body.get("status") not in STATES_IN_PROGRESS:
                break
            await self._timing.sleep(self.poll_ms / 1000)
        has_output = body.get("status") not in STATES_WITHOUT_OUTPUT
        if exchange.is_streamed and has_output and not exchange.delivered:
            text = self._codec.reply(body, provider=self.provider_name).output_text
            await exchange.deliver([Delta(DeltaKind.TEXT, text)], lambda: exchange.took_ms)
        return body

    # --- requests ----------------------------------------------------------------------------------------

    def _url_of(self, running: _Running, end: str = "", query: Mapping[str, Any] | None = None) -> str:
        url = httpx.URL(self.url)
        path = f"{url.path.rstrip('/')}/{running.response_id}{end}"
        return with_query(str(url.copy_with(path=path)), query or {})

    async def _get(
        self, exchange: Exchange, running: _Running, query: Mapping[str, Any], *, is_state: bool = False
    ) -> Any:
        """One request for the response. Raises `_Gone` if the provider does not know it, and `_Busy`. Nobody
        hears the text of a mere state (`is_state`)."""
        sent_at = self._timing.clock()
        heard = replace(exchange, on_delta=None, on_piece=None) if is_state else exchange
        http = await self._client()
        request = http.build_request("GET", self._url_of(running, query=query), headers=running.headers)
        response = await with_translated_errors(http.send(request, stream=True))
        exchange.headers = response.headers
        try:
            if response.status_code == httpx.codes.NOT_FOUND:
                raise _Gone
            return await self._reading.body_of(
                response, heard, lambda: (self._timing.clock() - sent_at) * 1000
            )
        except (LLMConnectionError, LLMRateLimitError) as error:
            if response.is_success or error.is_final:  # the response has this error, or a retry is useless
                raise
            raise _Busy(error) from error
        finally:
            exchange.took_ms = (self._timing.clock() - sent_at) * 1000
            await response.aclose()

    async def _cancel_if_given_up(self, running: _Running) -> None:
        """Cancel the response at the provider, unless a later attempt of the call will continue it."""
        call = current_call.get()
        is_given_up = call is None or call.is_given_up is None or call.is_given_up()
        if running.response_id is None or not is_given_up:
            return
        with _logged_failure(running.response_id):
            await self._cancel(running)

    async def give_up_noted(self, note: Mapping[str, Any], *, tenant: str | None) -> None:
        with _logged_failure(self._response_id(note)):
            await self.cancel_noted(note, tenant=tenant)

    async def cancel_noted(self, note: Mapping[str, Any], *, tenant: str | None) -> bool:
        name = self._response_id(note)
        if name is None:
            return False
        key = await self._endpoint.keys.key(self.provider_name, tenant)
        try:
            await self._cancel(_Running(name, headers=self._headers_with(key)))
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error or error.response.status_code in (401, 403, 408, 429):
                raise
        return True  # another status: the response has ended, or the provider does not know it any more

    async def _cancel(self, running: _Running) -> None:
        async with asyncio.timeout(CANCEL_S):
            http = await self._client()
            url = self._url_of(running, "/cancel")
            request = http.build_request("POST", url, headers=running.headers)
            response = await http.send(request, stream=True)  # the body is not read: it may be large
            await response.aclose()
            response.raise_for_status()
