"""Model clients over HTTP: the only place that sends requests to a provider, and retries them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import httpx

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import (
    LLMAuthError,
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMReplyFiltered,
    LLMReplyTooLarge,
    LLMResponseError,
)
from openagents_worker.http_replies import (
    ACCEPT_ENCODING,
    ReplyTooLarge,
    ReplyUnreadable,
    no_cookies,
    with_translated_errors,
)
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import (
    FinishReason,
    LLMResponse,
    LLMUsage,
    ModelClient,
    ModelRequest,
    current_call,
)
from openagents_worker.llm.call_usage import estimated_usage, joined_usage, measures_of, usage_of_errors
from openagents_worker.llm.codec import Codec, StreamReader
from openagents_worker.llm.connection_options import ConnectionOptions, hint_for_connection
from openagents_worker.llm.connection_pool import ConnectionPool
from openagents_worker.llm.conversation import is_blank
from openagents_worker.llm.current_call import ids_of_call
from openagents_worker.llm.endpoints import with_query
from openagents_worker.llm.failures import presentable, request_id_of, wait_of
from openagents_worker.llm.largest_cost import largest_cost_usd
from openagents_worker.llm.limits import Limiter
from openagents_worker.llm.pricing import estimate_tokens, price, region_of
from openagents_worker.llm.reading import Endpoint, Exchange, ReplyReading
from openagents_worker.llm.refused_fields import MAX_REPAIRS, RefusedFields
from openagents_worker.llm.refused_parameters import RefusedParameters
from openagents_worker.llm.retry import emit_retry, pause_ms
from openagents_worker.llm.structured import RejectedFormats, is_rejected, without_output_tool
from openagents_worker.models import header_text
from openagents_worker.telemetry.logs import get_logger

__all__ = ["Codec", "Endpoint", "HttpModelClient", "StreamReader", "Timing", "call_headers"]

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """The clock and the randomness of the pauses between tries; tests replace them. Times are in seconds."""

    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Callable[[], float] = random.random
    clock: Callable[[], float] = time.monotonic


class HttpModelClient(ModelClient):
    """A model that is called by an HTTP POST request. The codec defines the JSON of requests and replies.

    The reply is streamed if the request has a listener. A failed request is retried according to
    `options.retry`, in all attempts of a run together: short pauses are waited for here, longer ones suspend
    the run. A streamed request is repeated here only until the first piece was delivered. Raises the errors
    of `openagents_worker.llm.failures`, `LLMConnectionError` for a lost connection or an incomplete stream,
    and `LLMReplyTooLarge` (more than `options.max_reply_bytes`). No error contains the key.
    """

    limits_each_try = True

    def __init__(
        self,
        model: str,
        options: LLMOptions,
        *,
        endpoint: Endpoint,
        codec: Codec,
        connections: ConnectionOptions | None = None,
        http: httpx.AsyncClient | None = None,
        timing: Timing | None = None,
    ) -> None:
        """`model` is the default for requests without a model. The caller closes an `http` that it passes;
        `connections` are not used for it."""
        self.provider_name = endpoint.provider
        self.model_id = model
        self.url = with_query(endpoint.url, options.extra_query)
        self.stream_url = with_query(endpoint.stream_url, options.extra_query)
        self._options, self._region = options, region_of(endpoint.url)
        self._endpoint = endpoint
        self._connections = connections or ConnectionOptions.of(options, {})
        self._codec = codec
        self._limiter = Limiter(options, options.limits) if options.limits is not None else None
        self._reading = ReplyReading(endpoint, codec, max_bytes=options.max_reply_bytes)
        self._http, self._owns_http = http, http is None
        self._opening = asyncio.Lock()
        self._timing = timing or Timing()
        self.keeps_format = False
        """Whether `response_format` is sent although the provider rejects it: it was configured."""
        self._rejected, self._refused = RejectedFormats(), RefusedFields()
        self._parameters = RefusedParameters()

    async def respond(self, request: ModelRequest) -> LLMResponse:
        request, failed = self._refused.usable(request), 0
        for _ in range(MAX_REPAIRS):
            try:
                return await self._respond_in_format(request, failed)
            except LLMResponseError as error:
                if self._parameters.add(request.model or self.model_id, error):
                    self._log_refusal("llm.parameter_refused", error)
                elif (repeated := self._refused.repaired(request, error)) is not None:
                    is_strict = repeated.strict_forms != request.strict_forms
                    self._log_refusal(
                        "llm.strict_server" if is_strict else "llm.opaque_fields_refused", error
                    )
                    request = repeated
                else:
                    raise
                failed = error.requests
        return await self._respond_in_format(request, failed)

    async def _respond_in_format(self, request: ModelRequest, failed: int) -> LLMResponse:
        """The reply in the `response_format` of the request, if the provider has it."""
        if request.response_format is None:  # the usual case
            return await self._respond(request, failed=failed)
        if self._rejected.has(request):
            return await self._respond(replace(request, response_format=None), failed=failed)
        try:
            return without_output_tool(await self._respond(request, failed=failed))
        except LLMResponseError as error:
            if self.keeps_format or not is_rejected(error):
                raise
            self._log_refusal("llm.structured_output_rejected", error)
            failed = error.requests
            self._rejected.add(request, error)
        return await self._respond(replace(request, response_format=None), failed=failed)

    def _log_refusal(self, event: str, error: LLMError) -> None:
        log.warning(event, **ids_of_call(), provider=self.provider_name, error=error.message)

    async def _respond(self, request: ModelRequest, *, failed: int = 0) -> LLMResponse:
        """The reply. `failed`: how many requests this attempt has sent for the call already."""
        model, on_delta = request.model or self.model_id, request.on_delta
        if not self._options.stream:
            request = replace(request, on_delta=None, on_piece=None)
        body = self._parameters.without(self._codec.body(request, model) | self._options.extra_body)
        exchange = Exchange(body, request.on_delta, request.on_piece, requests=failed)
        if self._limiter is not None:
            exchange.tokens = self._limiter.tokens_of(request)
        try:
            reply = await self._respond_before_deadline(exchange)
        except LLMError as error:
            error.usage = joined_usage(exchange.used_before)
            raise
        if not self._options.stream and on_delta is not None and reply.output_text:
            await on_delta(reply.output_text)
        counted = reply.usage or estimated_usage(request.messages, reply)
        usage = joined_usage([*exchange.used_before, self._priced(counted, exchange, served=reply.model)])
        is_filtered = reply.finish_reason == FinishReason.CONTENT_FILTER
        if is_filtered and not reply.tool_calls and is_blank(reply.output_text):
            blocked = LLMReplyFiltered(f"{self.provider_name}: the provider's filter blocked the reply")
            blocked.request_id = request_id_of(exchange.headers)
            blocked.usage = joined_usage(exchange.used_before) if reply.usage is None else usage
            raise blocked
        return replace(reply, usage=usage, request_id=request_id_of(exchange.headers))

    def _priced(self, usage: LLMUsage, exchange: Exchange, *, served: str | None = None) -> LLMUsage:
        """The usage of the newest request, with its measurements and its cost."""
        region = {"inference_geo": self._region} if self._region else {}
        usage = replace(usage, metadata={**usage.metadata, **measures_of(exchange, usage), **region})
        return price(exchange.body["model"], usage, self._options.pricing, served=served)

    def largest_cost_usd(self, request: ModelRequest) -> float | None:
        return largest_cost_usd(request, request.model or self.model_id, self._options)

    def count_tokens(self, text: str) -> int:
        return estimate_tokens(text)

    async def aclose(self) -> None:
        """Close the connections that this client opened."""
        if self._owns_http and self._http is not None:
            http, self._http = self._http, None
            self._opening = asyncio.Lock()  # the next request may run on another event loop
            await http.aclose()

    # --- tries -------------------------------------------------------------------------------------------

    async def _respond_before_deadline(self, exchange: Exchange) -> LLMResponse:
        """The reply, within `options.whole_call_ms`. A `TimeoutError` from `on_delta` is raised unchanged."""
        limit_ms = self._options.whole_call_ms
        deadline = asyncio.timeout(limit_ms / 1000)
        try:
            async with deadline:
                return await self._respond_with_retries(exchange)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            late = LLMConnectionError(
                f"{self.provider_name}: no complete reply within {limit_ms} ms",
                hint="llm.total_timeout_ms limits the whole call; llm.timeout_ms limits the wait for data",
            )
            exchange.requests += 1
            self._pause_inside_ms(late, exchange, 0.0)  # sets how many requests were sent, and are left
            raise late from error

    async def _respond_with_retries(self, exchange: Exchange) -> LLMResponse:
        started = self._timing.clock()
        while True:
            try:
                reply = await self._send_within_limits(exchange)
            except LLMError as error:
                exchange.requests += 1
                exchange.used_before += [self._priced(used, exchange) for used in usage_of_errors([error])]
                spent_ms = (self._timing.clock() - started) * 1000
                pause = self._pause_inside_ms(error, exchange, spent_ms)
                if pause is None:
                    raise
                emit_retry(error, model=exchange.body["model"], delay_ms=pause, attempt=exchange.requests)
                await self._timing.sleep(pause / 1000)
            else:
                exchange.measures["retries"] = exchange.requests
                return reply

    def _pause_inside_ms(self, error: LLMError, exchange: Exchange, spent_ms: float) -> float | None:
        """Milliseconds before the next try of this call. None: the error is raised to the run.

        A run that can be suspended waits here only for a short pause; the error says how long the run has to
        wait otherwise, and whether the call has tries left.
        """
        retry, call = self._options.retry, current_call.get()
        error.requests, error.is_partial = exchange.requests, exchange.delivered
        lost_connection = isinstance(error.__cause__, httpx.TransportError)
        tries, random = self._tries(exchange), self._timing.random
        pause = pause_ms(retry, error, tries=tries, spent_ms=spent_ms, random=random)
        if pause is None or (lost_connection and not retry.retry_on_connection_errors):
            error.is_final = True
            return None
        if call is not None and call.may_suspend:
            if exchange.delivered or pause > retry.suspend_above_ms:
                error.retry_after_ms = max(error.retry_after_ms or 0, round(pause))
                return None
            return pause
        return None if exchange.delivered or pause > 2 * retry.max_backoff_ms else pause

    def is_sent_already(self) -> bool:
        """Whether an earlier try has sent the request of this call, and this one only gets its reply."""
        return False

    async def _send_within_limits(self, exchange: Exchange) -> LLMResponse:
        """One try, as soon as the limits of the fleet allow it. Raises `LimitWait` if that is not soon."""
        if self._limiter is None or self.is_sent_already():
            return await self._send_once(exchange)
        model = exchange.body["model"]
        return await self._limiter.send(
            lambda: self._send_once(exchange), model=model, tokens=exchange.tokens
        )

    async def _send_once(self, exchange: Exchange) -> LLMResponse:
        """One try. If the provider refuses a key that was replaced meanwhile, one more with the new key."""
        if exchange.request_headers is None:
            self._authorize(exchange, await self._key())
        try:
            return await self._send_with_key(exchange)
        except LLMError as error:
            if not isinstance(error, LLMAuthError) and error.status != httpx.codes.UNAUTHORIZED:
                raise
            key = await self._key(fresh=True)
            if key == exchange.key or self._tries(exchange) + 1 >= self._options.retry.max_attempts:
                raise
            exchange.requests += 1
            emit_retry(error, model=exchange.body["model"], delay_ms=0, attempt=exchange.requests)
        self._authorize(exchange, key)
        return await self._send_with_key(exchange)

    async def _key(self, *, fresh: bool = False) -> str | None:
        """The key for the call that is running; see `ApiKeys.key`."""
        call = current_call.get()
        tenant = None if call is None else call.tenant
        return await self._endpoint.keys.key(self.provider_name, tenant, fresh=fresh)

    def _authorize(self, exchange: Exchange, key: str | None) -> None:
        """Use this key for the requests of the call from now on."""
        exchange.key = key
        exchange.secrets = [*self._endpoint.secrets, key] if key else self._endpoint.secrets
        exchange.request_headers = self._headers_with(key)

    def _headers_with(self, key: str | None) -> dict[str, str]:
        """The headers of every request. Those of the agent go before those with the key."""
        endpoint = self._endpoint
        with_key = endpoint.key_headers(key) if key else {}
        return {"accept-encoding": ACCEPT_ENCODING, **with_key, **endpoint.headers}

    def _tries(self, exchange: Exchange) -> int:
        """How many requests of the call have failed, in all attempts of its run."""
        call = current_call.get()
        return exchange.requests + (call.requests if call is not None else 0)

    async def _send_with_key(self, exchange: Exchange) -> LLMResponse:
        """One request. Errors of httpx and of the reply's size and format become errors of this library."""
        try:
            return self._codec.reply(await self._reply_body(exchange), provider=self.provider_name)
        except LLMError as error:
            error.request_id = error.request_id or request_id_of(exchange.headers)
            if isinstance(error, LLMRateLimitError) and error.retry_after_ms is None:
                error.retry_after_ms = wait_of(exchange.headers)  # a codec does not see the headers
            error.args = (presentable(error.message, exchange.secrets),)  # a codec knows no secrets
            raise
        except httpx.TransportError as error:
            problem = f"no complete reply from {httpx.URL(self.url).host} ({type(error).__name__}: {error})"
            raise LLMConnectionError(
                presentable(f"{self.provider_name}: {problem}", exchange.secrets),
                hint=hint_for_connection(error),
            ) from error
        except ReplyTooLarge as error:
            raise LLMReplyTooLarge(
                f"{self.provider_name}: {error}",
                hint="llm.max_reply_bytes limits the size of a reply, after decompression",
            ) from error
        except ReplyUnreadable as error:
            text = f"{self.provider_name}: the reply cannot be read: {error}"
            raise LLMResponseError(presentable(text, exchange.secrets)) from error

    async def _reply_body(self, exchange: Exchange) -> Any:
        """Send the request once, and return the body of the reply, streamed or not."""
        exchange.measures.clear()
        exchange.headers = httpx.Headers()
        sent_at = self._timing.clock()
        http = await self._client()
        request = http.build_request(
            "POST",
            self.stream_url if exchange.is_streamed else self.url,
            content=dumps(exchange.body).encode("utf-8", "replace"),  # lone surrogates cannot be encoded
            headers={**(exchange.request_headers or {}), **call_headers(part=len(exchange.parts))},
        )
        response = await with_translated_errors(http.send(request, stream=True))
        exchange.headers = response.headers
        try:
            return await self._reading.body_of(
                response, exchange, lambda: (self._timing.clock() - sent_at) * 1000
            )
        finally:
            exchange.took_ms = (self._timing.clock() - sent_at) * 1000
            await response.aclose()

    # --- the connection ----------------------------------------------------------------------------------

    async def _client(self) -> httpx.AsyncClient:
        """The HTTP client, created at the first call. Each event loop has connections of its own in it."""
        if self._http is not None:
            return self._http
        async with self._opening:
            if self._http is None:
                options = self._options
                timeout = httpx.Timeout(options.timeout_ms / 1000, connect=options.connect_timeout_ms / 1000)
                try:
                    # In a thread: reading the certificates takes 0.1 s, which would block the event loop.
                    pool = await asyncio.to_thread(ConnectionPool, self.url, options=self._connections)
                except ValueError as error:  # a file was removed since the start
                    raise LLMConnectionError(f"{self.provider_name}: {error}") from error
                self._http = httpx.AsyncClient(transport=pool, timeout=timeout, cookies=no_cookies())
            return self._http


def call_headers(*, part: int = 0) -> dict[str, str]:
    """The headers by which a server, or a person who reads its log, recognises a repeated call.

    `part` counts the requests that continue a reply, from 0: each of them has a key of its own.
    """
    info = current_call.get()
    if info is None:
        return {}
    return {
        "Idempotency-Key": header_text(f"{info.idempotency_key}:{part}" if part else info.idempotency_key),
        "X-Call": header_text(info.call_id),
    }
