"""HTTP: `http_request`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal

import httpx
from pydantic import Field

from openagents_worker.errors import (
    PermanentToolError,
    ToolError,
    ToolRateLimitError,
    ToolTimeoutError,
    ToolUnavailableError,
    ToolValidationError,
)
from openagents_worker.http_replies import (
    ACCEPT_ENCODING,
    ReplyUnreadable,
    beginning_of,
    text_of_body,
    with_translated_errors,
)
from openagents_worker.models import header_text
from openagents_worker.retry_after import retry_after_ms
from openagents_worker.tools.base import Reconciled, ToolContext, ToolExecutionSpec
from openagents_worker.tools.builtin.clock import utc_now
from openagents_worker.tools.builtin.http_client import open_client
from openagents_worker.tools.policies import check_redirect
from openagents_worker.tools.typed import TypedTool, with_own_limit

__all__ = ["HttpRequest"]

MAX_REDIRECTS = 5
MAX_PORT = 65_535
LARGEST_MAX_BYTES = 64 * 1024 * 1024
LONGEST_TIMEOUT_S = 24 * 60 * 60
READABLE_ENCODINGS = frozenset({*ACCEPT_ENCODING.split(", "), "x-gzip", "identity"})
SAFE_METHODS = frozenset({"GET", "HEAD"})
# These delimit the request on the connection or identify it, so a model may not set them.
RESERVED_HEADERS = frozenset(
    {"connection", "content-length", "host", "idempotency-key", "transfer-encoding", "upgrade"}
)
# Headers that are also sent after a redirect to another host. Any other header may hold a credential.
HEADERS_KEPT_ON_REDIRECT = frozenset(
    {
        *("accept", "accept-encoding", "accept-language", "cache-control", "content-encoding"),
        *("content-language", "content-length", "content-type", "host", "idempotency-key", "range"),
        *("transfer-encoding", "user-agent"),
    }
)


class HttpRequest(TypedTool):
    """Sends one request and returns the reply as data. For a status from 400, `success` is false.

    A request without a reply raises an error. The error is retryable if repeating the request is harmless
    (GET, HEAD, or nothing was sent). Otherwise it is a `PermanentToolError` that says that the outcome is
    unknown. Requests with other methods have an `Idempotency-Key`, the same in every attempt.
    """

    name = "http_request"
    description = (
        "Sends an HTTP request and gives status, headers and body of the answer. After a redirect, "
        "`redirected_to` is the request that was answered."
    )
    spec = ToolExecutionSpec(side_effects="network")
    durable_idempotent = False

    class Config(TypedTool.Config):
        timeout: float = Field(
            30,
            gt=0,
            le=LONGEST_TIMEOUT_S,
            description="Timeout of the whole request, including redirects, in seconds.",
        )
        max_bytes: int = Field(
            200_000,
            ge=1,
            le=LARGEST_MAX_BYTES,
            description="Largest number of bytes of a body that are read.",
        )
        allow_hosts: list[str] | None = Field(
            None,
            description="Allowed hosts, also private ones (`*.example.com` for all subdomains). None: any.",
        )
        deny_private_networks: bool = Field(
            True, description="Whether addresses that are not on the public internet are rejected."
        )

    class Params(TypedTool.Params):
        url: str = Field(min_length=1, max_length=8192, description="An absolute http or https URL.")
        method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"] = Field(
            "GET", description="The method."
        )
        headers: dict[str, str] = Field(default_factory=dict, description="Request headers.")
        body: str | dict[str, Any] | list[Any] | None = Field(
            None, description="The body: a text as it is; an object or array is sent as JSON."
        )
        timeout: float | None = Field(
            None, gt=0, le=600, description="Seconds, at most the configured timeout."
        )

    def __init__(
        self, config: dict[str, Any] | None = None, *, now: Callable[[], datetime] = utc_now
    ) -> None:
        super().__init__(config)
        self._now = now
        self._client: httpx.AsyncClient | None = None

    def execution_spec(self) -> ToolExecutionSpec:
        return with_own_limit(self.spec, self.cfg.timeout * 1000)

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        client = await self._open_client()
        request = self._request(client, args, context)
        seconds = min(args.timeout or self.cfg.timeout, self.cfg.timeout)
        try:
            async with asyncio.timeout(seconds):
                return await self._exchange(client, request)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise self._failure(request, f"no answer within {seconds:g} s", ToolTimeoutError) from error
        except ReplyUnreadable as error:
            raise self._failure(request, f"the answer cannot be read: {error}", PermanentToolError) from error
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as error:
            raise ToolValidationError(f"the request is not valid HTTP: {error}", self.name) from error
        except httpx.TransportError as error:
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise self._failure(request, reason, ToolUnavailableError) from error

    async def reconcile(
        self, params: dict[str, Any], idempotency_key: str, context: ToolContext | None
    ) -> Reconciled:
        """GET and HEAD may be repeated. Only the server knows what became of any other request."""
        is_safe = params.get("method", "GET") in SAFE_METHODS
        return Reconciled.not_done() if is_safe else Reconciled.unknown()

    async def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    def _request(self, client: httpx.AsyncClient, args: Params, context: ToolContext | None) -> httpx.Request:
        refused = sorted(RESERVED_HEADERS & {name.lower() for name in args.headers})
        if refused:
            raise ToolValidationError(f"headers: {', '.join(refused)} cannot be set", self.name)
        if not all(part.isascii() and part.isprintable() for pair in args.headers.items() for part in pair):
            raise ToolValidationError("headers: only printable ASCII is allowed", self.name)
        body = {"json": args.body} if isinstance(args.body, dict | list) else {"content": args.body}
        try:
            headers = _with_readable_encodings(args.headers)
            request = client.build_request(args.method, args.url, headers=headers, **body)
            url = request.url
            is_absolute = url.scheme in ("http", "https") and url.host and (url.port or 0) <= MAX_PORT
        except Exception as error:  # idna and the codecs for host names raise errors of their own
            raise ToolValidationError(f"the request cannot be built: {error}", self.name) from error
        request.extensions["trace"] = _Trace()
        if not is_absolute:
            raise ToolValidationError("url: expected an absolute http or https URL", self.name)
        if args.method not in SAFE_METHODS and context is not None:
            request.headers["Idempotency-Key"] = header_text(context.idempotency_key)
        return request

    async def _exchange(self, client: httpx.AsyncClient, request: httpx.Request) -> dict[str, Any]:
        may_repeat = request.method in SAFE_METHODS  # a redirect of a POST is often a GET
        for redirects in range(MAX_REDIRECTS + 1):
            response = await with_translated_errors(client.send(request, stream=True))
            try:
                if response.next_request is None:
                    result = await self._result(request, response, may_repeat=may_repeat)
                    # After a DELETE, for example, the answer may be the page of a login.
                    answered = {"redirected_to": f"{request.method} {request.url}"} if redirects else {}
                    return {**result, **answered}
                await check_redirect(str(response.next_request.url))
                request = _redirected(request, response.next_request)
            finally:
                await response.aclose()
        raise ReplyUnreadable(f"more than {MAX_REDIRECTS} redirects")

    async def _result(
        self, request: httpx.Request, response: httpx.Response, *, may_repeat: bool
    ) -> dict[str, Any]:
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS and may_repeat:
            after_ms = retry_after_ms(response.headers, now=self._now())
            raise ToolRateLimitError(f"{request.url.host} asks for fewer requests", self.name, after_ms)
        body, truncated = await beginning_of(response, max_bytes=self.cfg.max_bytes)
        text = text_of_body(body, response.headers.get("content-type", ""))
        return {
            "success": response.is_success,
            "status": response.status_code,
            "headers": dict(response.headers),
            "body": text.removesuffix("\ufffd") if truncated else text,  # a character that was cut
            "truncated": truncated,
        }

    def _failure(self, request: httpx.Request, reason: str, retryable_class: type[ToolError]) -> ToolError:
        """An error of `retryable_class` if repeating the request is harmless; otherwise: outcome unknown."""
        host = request.url.host  # not the whole URL: its query may contain a key
        if request.method in SAFE_METHODS or request.extensions["trace"].is_only_connecting:
            return retryable_class(f"{request.method} {host}: {reason}", self.name)
        return PermanentToolError(
            f"the outcome of {request.method} {host} is unknown: {reason}",
            self.name,
            hint="find out whether it took effect before repeating it",
        )

    async def _open_client(self) -> httpx.AsyncClient:
        if self._client is None:
            opened = await open_client(
                self.name, self.cfg.allow_hosts, self.cfg.deny_private_networks, timeout_s=self.cfg.timeout
            )
            self._client = self._client or opened
        return self._client


def _with_readable_encodings(headers: dict[str, str]) -> dict[str, str]:
    """The headers, with the compressions that can be read. Without a wish of the model: none, because a
    compressed body could expand to a thousand times `max_bytes`."""
    asked = [value for name, value in headers.items() if name.lower() == "accept-encoding"]
    codings = [coding.strip() for value in asked for coding in value.split(",")]
    readable = [each for each in codings if each.partition(";")[0].strip().lower() in READABLE_ENCODINGS]
    others = {name: value for name, value in headers.items() if name.lower() != "accept-encoding"}
    return {"accept-encoding": ", ".join(readable) or "identity", **others}


def _redirected(request: httpx.Request, redirect: httpx.Request) -> httpx.Request:
    """The request of a redirect, without headers that may hold credentials if it goes to another origin."""
    if not _is_same_origin(request.url, redirect.url):
        for name in [name for name in redirect.headers if name.lower() not in HEADERS_KEPT_ON_REDIRECT]:
            del redirect.headers[name]
    return redirect


def _is_same_origin(one: httpx.URL, other: httpx.URL) -> bool:
    """Whether scheme, host and port are equal. From http to https on the default ports counts as equal."""
    if one.raw_host != other.raw_host:
        return False
    ports = {"http": 80, "https": 443}
    if (one.scheme, other.scheme) == ("http", "https"):
        return (one.port or 80, other.port or 443) == (80, 443)
    return one.scheme == other.scheme and (one.port or ports.get(one.scheme)) == (
        other.port or ports.get(other.scheme)
    )


class _Trace:
    """What a request and its redirects have done on the network, by the events of httpcore."""

    def __init__(self) -> None:
        self._has_connected = False
        self._has_gone_on = False

    async def __call__(self, event: str, _: dict[str, Any]) -> None:
        is_of_connecting = event.startswith("connection.")
        self._has_connected |= is_of_connecting
        self._has_gone_on |= not is_of_connecting

    @property
    def is_only_connecting(self) -> bool:
        """Whether it has opened a connection, or tried to, and nothing was sent at all."""
        return self._has_connected and not self._has_gone_on
