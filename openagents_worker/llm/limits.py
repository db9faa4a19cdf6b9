"""Limits of the fleet: the only place where a request to a model waits for the limits of all workers.

`llm.limits` of an agent names a limit and its numbers. The runtime keeps the count, in Redis (`FleetLimits`).
Each request counts, so a retried call counts several times. A request that is answered from the journal is
not sent, and does not count.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote

from openagents_worker.agents import LLMLimits, LLMOptions
from openagents_worker.errors import LLMRateLimitError
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import LLMClient, LLMResponse, ModelClient, ModelRequest, current_call
from openagents_worker.llm.pricing import estimate_tokens, estimate_usage

__all__ = [
    "FleetLimits",
    "LimitWait",
    "LimitedClient",
    "Limiter",
    "RequestLimit",
    "Reserved",
    "estimated_tokens",
    "limit_name",
]

REPLY_TOKENS = 1_024
"""Tokens that are reserved for a reply if the request does not limit it."""
SAFE = "/:@"
"""Characters of a model's name that its limit shows as they are."""


@dataclass(frozen=True, slots=True)
class RequestLimit:
    """The limit for one request: its name, and the numbers; 0 means no such limit."""

    name: str
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrency: int = 0


class LimitWait(BaseException):
    """The run has to wait for a limit for longer than a call waits: the runtime parks it.

    It is not an `Exception`, so that no client takes it for a failure of its request.
    """

    def __init__(self, name: str, delay_ms: int, tenant: str = "") -> None:
        """`delay_ms` is the estimated time until there is room. `tenant`: that of the run, for its turn."""
        super().__init__(f"the limit {name!r} has no room for about {delay_ms} ms")
        self.name = name
        self.delay_ms = delay_ms
        self.tenant = tenant


class Reserved(Protocol):
    """A reserved request. It must be ended exactly once, however the request has ended."""

    def end(self, *, used: int | None = None, was_sent: bool = True, retry_after_ms: int = 0) -> None:
        """`used`: the tokens that the request used; None: as many as were reserved. `retry_after_ms`: the
        provider asked to wait for so long."""


class FleetLimits(Protocol):
    """The limits as an attempt sees them."""

    @property
    def tenant(self) -> str:
        """The tenant of the run; "" if it has none."""

    async def reserve(self, limit: RequestLimit, tokens: int) -> Reserved:
        """Wait until the request may be sent. Raises `LimitWait`; for a run that cannot be parked,
        `LLMRateLimitError` after a minute."""


class Limiter:
    """The limits of one client: sends each request within them."""

    def __init__(self, options: LLMOptions, limits: LLMLimits) -> None:
        self._provider = options.provider
        self._max_tokens = options.max_tokens or REPLY_TOKENS
        self._limits = limits

    async def send(
        self, send: Callable[[], Awaitable[LLMResponse]], *, model: str, tokens: int
    ) -> LLMResponse:
        """The reply of `send`, which sends one request. `tokens` is the estimate of `tokens_of`."""
        call = current_call.get()
        if call is None or call.limits is None:  # outside of a run
            return await send()
        reserved = await call.limits.reserve(self._limit(model, call.limits.tenant), tokens)
        used, retry_after_ms = None, 0
        try:
            reply = await send()
            used = _tokens_used(reply)
        except LLMRateLimitError as error:
            used, retry_after_ms = 0, error.retry_after_ms or 0
            raise
        finally:
            reserved.end(used=used, retry_after_ms=retry_after_ms)
        return reply

    def tokens_of(self, request: ModelRequest) -> int:
        """The estimated tokens of a request and its reply. 0 if there is no limit for tokens."""
        if self._limits.tokens_per_minute is None:
            return 0
        return estimated_tokens(request, self._max_tokens)

    def _limit(self, model: str, tenant: str) -> RequestLimit:
        limits = self._limits
        return RequestLimit(
            limit_name(limits.key, provider=self._provider, model=model, tenant=tenant),
            limits.requests_per_minute or 0,
            limits.tokens_per_minute or 0,
            limits.max_concurrency or 0,
        )


def estimated_tokens(request: ModelRequest, reply_tokens: int) -> int:
    """The estimated tokens of a request and its reply, which has `reply_tokens` if the request does not limit
    it."""
    asked = estimate_usage(request.messages, "").input_tokens
    if request.tools:
        asked += estimate_tokens(dumps(list(request.tools)))
    return asked + (request.max_tokens or reply_tokens)


def limit_name(key: str, *, provider: str, model: str, tenant: str) -> str:
    """The name of the limit for a call.

    The name of a tenant cannot imitate another limit: it stands behind a `=`, which no key can have.

    >>> limit_name("{provider}:{model}", provider="openai_compatible", model="gpt-5", tenant="")
    'openai_compatible:gpt-5'
    >>> limit_name("{tenant}", provider="mock", model="m", tenant="a:b")
    'tenant=a%3Ab'
    """
    return (
        key.replace("{provider}", quote(provider, safe=SAFE))
        .replace("{model}", quote(model, safe=SAFE))
        .replace("{tenant}", f"tenant={quote(tenant, safe='')}")
    )


def _tokens_used(reply: LLMResponse) -> int | None:
    usage = reply.usage
    return None if usage is None else usage.total_tokens or usage.input_tokens + usage.output_tokens


class LimitedClient(ModelClient):
    """A client that sends one request for each call, within the limits of the fleet."""

    def __init__(self, client: LLMClient, limiter: Limiter) -> None:
        self._client = client
        self._limiter = limiter
        self.provider_name = client.provider_name
        self.model_id = client.model_id
        self.is_billed = getattr(client, "is_billed", True)

    async def respond(self, request: ModelRequest) -> LLMResponse:
        async def send() -> LLMResponse:
            if isinstance(self._client, ModelClient):
                return await self._client.respond(request)
            return await self._client.generate(**request.arguments())

        model = request.model or self.model_id
        return await self._limiter.send(send, model=model, tokens=self._limiter.tokens_of(request))

    def largest_cost_usd(self, request: ModelRequest) -> float | None:
        return self._client.largest_cost_usd(request) if isinstance(self._client, ModelClient) else None

    def count_tokens(self, text: str) -> int:
        return self._client.count_tokens(text)

    async def aclose(self) -> None:
        await self._client.aclose()
