"""Servers that speak HTTP: the only place that bounds their answers, and sees why a request has failed.

The transports of the SDK turn each failure into another error, or into none. Whether a call may be made again
depends on whether the server can have got it.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import httpx

from openagents_worker.redaction import safe_message
from openagents_worker.retry_after import retry_after_ms
from openagents_worker.tools.mcp.stdio import MAX_MESSAGE_BYTES
from openagents_worker.tools.mcp.streams import mend

__all__ = [
    "KEY",
    "SESSION_GONE",
    "SESSION_MAY_BE_GONE",
    "HttpFailure",
    "client_factory",
    "request_key",
    "trusted_certificates",
]

CONNECT_TIMEOUT_S = 10.0
WRITE_TIMEOUT_S = 60.0
SESSION_GONE = 404
SESSION_MAY_BE_GONE = 400  # so do many servers that should say 404
REFUSED = frozenset({400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 429})
"""Statuses of requests that were not executed."""
MAX_REASON_CHARS = 300
KEY = "openagents-worker/idempotencyKey"
"""The entry of `_meta` with the idempotency key of a call."""
EMPTY_LINES = (b"\n\n", b"\n\r", b"\r\r")
"""How an event of a stream can end: with an empty line, whatever its line ends are."""


@dataclass(frozen=True, slots=True)
class HttpFailure:
    """A request that has failed. `key` is that of its call; None for another request."""

    key: str | None
    reason: str
    status: int | None = None
    may_have_run: bool = True
    retry_after_ms: int | None = None
    is_final: bool = False
    """Whether the answer is too large."""


def request_key(message: Mapping[str, Any]) -> str | None:
    """The idempotency key in a message that is sent; None if it is not the call of a tool."""
    params = message.get("params")
    meta = params.get("_meta") if isinstance(params, dict) else None
    key = meta.get(KEY) if isinstance(meta, dict) else None
    return key if isinstance(key, str) else None


def client_factory(
    library: Any,
    own_headers: Mapping[str, str],
    certificates: ssl.SSLContext,
    on_failure: Callable[[HttpFailure], None],
) -> Callable[..., Any]:
    """Makes the HTTP clients of a connection, as the SDK calls it. `library`: that of its version."""

    def make(headers: Mapping[str, str] | None = None, timeout: Any = None, auth: Any = None) -> Any:
        return library.AsyncClient(
            # Without compression: a few kilobytes of gzip can expand to gigabytes.
            headers={**(headers or {}), **own_headers, "accept-encoding": "identity"},
            # A call has a limit of its own; between two events of a stream any time may pass.
            timeout=library.Timeout(CONNECT_TIMEOUT_S, read=None, write=WRITE_TIMEOUT_S),
            transport=_observed(library)(library.AsyncHTTPTransport(verify=certificates), on_failure),
            follow_redirects=False,  # the newer versions of the SDK follow those that stay on the server
            trust_env=False,
        )

    return make


@lru_cache(maxsize=1)  # reading the certificates takes 0.1 s
def trusted_certificates() -> ssl.SSLContext:
    """The public authorities, as for the requests to models."""
    return httpx.create_ssl_context()


class Unfinished:
    """The part of an answer that has not arrived completely: the last event of a stream, or a whole body."""

    def __init__(self, *, is_stream: bool) -> None:
        self._is_stream = is_stream
        self._bytes = bytearray()

    def __len__(self) -> int:
        return len(self._bytes)

    def add(self, piece: bytes) -> bytes:
        """The events that are complete with this piece.

        >>> stream = Unfinished(is_stream=True)
        >>> stream.add(b"data: 1\\n"), stream.add(b"\\ndata"), stream.add(b": 2\\r\\n\\r\\n"), len(stream)
        (b'', b'data: 1\\n\\n', b'data: 2\\r\\n\\r\\n', 0)
        """
        begin = max(0, len(self._bytes) - 1)
        self._bytes += piece
        if not self._is_stream:
            return b""
        found = max(self._bytes.rfind(each, begin) for each in EMPTY_LINES)
        end = 0 if found < 0 else found + 2
        # The rest of this empty line, or of the last one.
        while bytes(self._bytes[end : end + 1]) in (b"\r", b"\n"):
            end += 1
        whole = bytes(self._bytes[:end])
        del self._bytes[: len(whole)]
        return whole

    def rest(self) -> bytes:
        """What has arrived when the answer ends."""
        return bytes(self._bytes)


@lru_cache(maxsize=2)
def _observed(library: Any) -> Any:
    """The class of transports that observe failures, for a version of the HTTP library."""
    not_sent = (library.ConnectError, library.ConnectTimeout, library.PoolTimeout)

    class Body(library.AsyncByteStream):  # type: ignore[misc]  # the base is known when the SDK is loaded
        """The body of an answer: each event of a stream, or the whole of another body, is bounded."""

        def __init__(self, response: Any, failed: Callable[[str, bool], None]) -> None:
            self._body = response.stream
            self._failed = failed
            self._encoding = response.headers.get("content-encoding", "").strip().lower()
            is_stream = response.headers.get("content-type", "").lower().startswith("text/event-stream")
            self._unfinished = Unfinished(is_stream=is_stream)

        async def __aiter__(self) -> AsyncIterator[bytes]:
            if self._encoding not in ("", "identity"):
                self._refuse(
                    f"an answer with the compression {self._encoding[:40]!r}, which was not asked for"
                )
            try:
                async for piece in self._body:
                    if whole := self._unfinished.add(piece):
                        yield await mend(whole)
                    if len(self._unfinished) > MAX_MESSAGE_BYTES:
                        self._refuse(f"a message of more than {MAX_MESSAGE_BYTES:,} bytes")
                yield await mend(self._unfinished.rest())
            except library.TransportError as error:
                self._failed(_reason(error), False)
                raise

        def _refuse(self, reason: str) -> NoReturn:
            """End this answer. The connection goes on, so it is not an error of the transport."""
            self._failed(reason, True)
            raise library.StreamError(reason)

        async def aclose(self) -> None:
            await self._body.aclose()

    class Observed(library.AsyncBaseTransport):  # type: ignore[misc]  # see above
        def __init__(self, transport: Any, on_failure: Callable[[HttpFailure], None]) -> None:
            self._transport = transport
            self._on_failure = on_failure

        async def handle_async_request(self, request: Any) -> Any:
            try:
                response = await self._transport.handle_async_request(request)
            except library.TransportError as error:
                self._fail(request, _reason(error), may_have_run=not isinstance(error, not_sent))
                raise
            status = response.status_code
            if status >= 400:
                self._fail(
                    request,
                    f"HTTP {status}",
                    status,
                    may_have_run=status not in REFUSED,
                    retry_after_ms=retry_after_ms(response.headers),
                )
            response.stream = Body(
                response, lambda reason, is_final: self._fail(request, reason, is_final=is_final)
            )
            return response

        def _fail(
            self,
            request: Any,
            reason: str,
            status: int | None = None,
            *,
            may_have_run: bool = True,
            retry_after_ms: int | None = None,
            is_final: bool = False,
        ) -> None:
            if request.method != "POST":  # the stream of notifications; not every server has it
                return
            try:
                key = request_key(json.loads(request.content))
            except (ValueError, AttributeError, library.StreamError):
                key = None
            self._on_failure(HttpFailure(key, reason, status, may_have_run, retry_after_ms, is_final))

        async def aclose(self) -> None:
            await self._transport.aclose()

    return Observed


def _reason(error: Exception) -> str:
    return safe_message(f"{type(error).__name__}: {error}".removesuffix(": "), MAX_REASON_CHARS)
