"""Fallback models: the only place that continues a call with another model if the first one cannot answer.

A call continues with the next model of `llm.fallbacks` if the provider cannot be reached, limits the rate for
longer than a call waits, refuses the key or the model, or if the quota of its account is used up. It does not
after a piece of the reply was delivered, nor if the request itself is refused: another model would see the
same request.

A response in the background (`llm.background`) is continued by the client that has created it. It is
cancelled before another client is asked, so that only one answer is paid for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from openagents_worker.agents import LLMOptions
from openagents_worker.errors import LLMError
from openagents_worker.llm.base import (
    CallInfo,
    LLMClient,
    LLMResponse,
    LLMUsage,
    ModelClient,
    ModelRequest,
    current_call,
)
from openagents_worker.llm.call_usage import joined_usage, usage_of_errors
from openagents_worker.llm.failures import is_out_of_quota
from openagents_worker.llm.fallback_keys import KEYS, share_key_of, without_secrets
from openagents_worker.telemetry.logs import get_logger

__all__ = ["FallbackClient", "fallback_options"]

log = get_logger(__name__)

UNAVAILABLE_STATUS = frozenset({401, 403, 404})
"""Statuses of a provider that refuses this key or this model, but perhaps not another one."""
SHARED = frozenset(
    {
        "temperature",
        "max_tokens",
        "connect_timeout_ms",
        "timeout_ms",
        "total_timeout_ms",
        "max_reply_bytes",
        "retry",
        "stream",
        "proxy",
        "http2",
    }
)
"""The options that a fallback of another provider takes from the agent."""
PASSED = ("temperature", "max_tokens")
"""The options that travel with each request: the patterns pass those of the agent."""


def fallback_options(options: LLMOptions) -> list[dict[str, Any]]:
    """The complete `llm` section of each fallback. Prices are never taken over: the model is another one."""
    own = options.model_dump(exclude_unset=True, exclude={"fallbacks", "pricing", "share_key"})
    return [{**_taken(own, entry), **entry} for entry in options.fallbacks]


def _taken(own: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry takes from the options of the agent."""
    if "provider" in entry:
        return {name: value for name, value in own.items() if name in SHARED}
    taken = without_secrets(own) if share_key_of(entry) is False else dict(own)
    if KEYS & entry.keys():
        taken = {name: value for name, value in taken.items() if name not in KEYS}
    if "api_base" in entry and "://" in str(taken.get("stream_endpoint")):  # it is at the agent's host
        del taken["stream_endpoint"]
    return taken


def _replaced_values(agent: LLMOptions) -> list[dict[str, Any]]:
    """For each fallback: the values of the agent for which its entry has an own one, or null."""
    return [{name: getattr(agent, name) for name in PASSED if name in entry} for entry in agent.fallbacks]


class FallbackClient(ModelClient):
    """Asks the first client; the next one if that cannot answer.

    `usage.metadata["fallback"]` of a reply names the fallback that gave it.
    """

    def __init__(
        self, clients: Sequence[LLMClient], *, max_attempts: int, agent: LLMOptions | None = None
    ) -> None:
        """`max_attempts`: the number of requests, to all models together, after which a call is not retried.
        Each fallback gets at least one request. `agent`: the options that the fallbacks belong to."""
        self._clients = list(clients)
        self._agents_values = [{}, *_replaced_values(agent)] if agent is not None else [{} for _ in clients]
        self._max_attempts = max_attempts
        self.provider_name = clients[0].provider_name
        self.model_id = clients[0].model_id

    async def respond(self, request: ModelRequest) -> LLMResponse:
        failed: list[LLMError] = []
        notes = _Notes(current_call.get())
        for position in range(self._first(request), len(self._clients)):
            client, own = self._clients[position], self._own(request, position)
            try:
                reply = await _respond(client, own, notes, sent=_requests(failed), position=position)
            except LLMError as error:
                failed.append(error)
                following = self._clients[position + 1 : position + 2]
                if not following or not _can_fall_back(error):
                    raise self._final(failed) from error
                await notes.cancel(client)
                _emit_fallback(error, own.model or client.model_id, following[0])
            else:
                return reply if position == 0 else _named(reply, client, usage_of_errors(failed))
        raise AssertionError("there is at least one client")

    def _own(self, request: ModelRequest, position: int) -> ModelRequest:
        """The request as this client gets it: without those values of the agent that its entry replaces.
        What the call itself asks for stays."""
        if position == 0:
            return request
        replaced = self._agents_values[position].items()
        unset: dict[str, Any] = {name: None for name, value in replaced if getattr(request, name) == value}
        return replace(request, model=self._clients[position].model_id, **unset)

    def _first(self, request: ModelRequest) -> int:
        """The first client that is asked: the one that an earlier attempt of the call has got a note from."""
        call = current_call.get()
        note = None if call is None else call.noted
        if note is None:
            return 0
        return next(iter(self._owners(note, request.model)), 0)

    def _owners(self, note: Mapping[str, Any], model: str | None = None) -> list[int]:
        """The clients that may have made the note, those with its model first. `model`: of the request."""
        owners = [
            position
            for position, client in enumerate(self._clients)
            if isinstance(client, ModelClient) and client.has_noted(note)
        ]
        models = [model or self.model_id, *(client.model_id for client in self._clients[1:])]
        return sorted(owners, key=lambda position: models[position] != note.get("model"))

    def _final(self, failed: Sequence[LLMError]) -> LLMError:
        """The error of the call: the retryable one that may be retried first, or else the last one."""
        call, error = current_call.get(), failed[-1]
        if _can_fall_back(error):
            retryable = (each for each in failed if each.retryable)
            error = min(retryable, key=_order_of_retry, default=error)
        error.requests, error.usage = _requests(failed), joined_usage(usage_of_errors(failed))
        sent = error.requests + (call.requests if call is not None else 0)
        error.is_final = error.is_final or sent >= self._max_attempts
        return error

    async def cancel_noted(self, note: Mapping[str, Any], *, tenant: str | None) -> bool:
        for position in self._owners(note):
            client = self._clients[position]
            if isinstance(client, ModelClient) and await client.cancel_noted(note, tenant=tenant):
                return True
        return False

    def largest_cost_usd(self, request: ModelRequest) -> float | None:
        """That of the dearest model whose price is known."""
        costs = [
            client.largest_cost_usd(self._own(request, position))
            for position, client in enumerate(self._clients)
            if isinstance(client, ModelClient)
        ]
        return max((cost for cost in costs if cost is not None), default=None)

    def count_tokens(self, text: str) -> int:
        return self._clients[0].count_tokens(text)

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()


def _can_fall_back(error: LLMError) -> bool:
    """Whether another model may answer the request."""
    if error.is_partial:
        return False
    return error.retryable or error.status in UNAVAILABLE_STATUS or is_out_of_quota(error)


def _order_of_retry(error: LLMError) -> tuple[bool, int]:
    return error.is_final, error.retry_after_ms or 0


def _requests(failed: Sequence[LLMError]) -> int:
    return sum(error.requests for error in failed)


class _Notes:
    """What the clients of one call have noted: the newest note counts."""

    def __init__(self, call: CallInfo | None) -> None:
        self._call = call
        self.newest: Mapping[str, Any] | None = None if call is None else call.noted

    async def keep(self, value: Mapping[str, Any]) -> None:
        self.newest = value
        if self._call is not None and self._call.note is not None:
            await self._call.note(value)

    async def cancel(self, client: LLMClient) -> None:
        """Cancel what the client has noted: another one is asked now."""
        note, self.newest = self.newest, None
        if note is not None and self._call is not None and isinstance(client, ModelClient):
            await client.give_up_noted(note, tenant=self._call.tenant)


async def _respond(
    client: LLMClient, request: ModelRequest, notes: _Notes, *, sent: int, position: int
) -> LLMResponse:
    """The reply of one client. It counts the requests that the clients before it have sent, and each client
    has its own idempotency key, because its request is another one."""
    call = current_call.get()
    if call is not None:
        call = replace(
            call,
            requests=call.requests + sent,
            noted=notes.newest,
            note=call.note and notes.keep,
            idempotency_key=f"{call.idempotency_key}:fallback-{position}"
            if position
            else call.idempotency_key,
        )
    token = current_call.set(call)
    try:
        if isinstance(client, ModelClient):
            return await client.respond(request)
        return await client.generate(**request.arguments())
    finally:
        current_call.reset(token)


def _named(reply: LLMResponse, client: LLMClient, used_before: Sequence[LLMUsage]) -> LLMResponse:
    """The reply with the name of the fallback that gave it, and with what the models before it have used."""
    usage = joined_usage([*used_before, *([] if reply.usage is None else [reply.usage])])
    if usage is None:
        return reply
    name = f"{client.provider_name}/{client.model_id}"
    return replace(reply, usage=replace(usage, metadata={**usage.metadata, "fallback": name}))


def _emit_fallback(error: LLMError, model: str, client: LLMClient) -> None:
    """Emit `llm.fallback` to the run's events and to the log."""
    call = current_call.get()
    payload: dict[str, Any] = {
        "code": error.code,
        "model": model,
        "fallback": f"{client.provider_name}/{client.model_id}",
        **({"request_id": error.request_id} if error.request_id else {}),
    }
    log.warning("llm.fallback", run_id=call.run_id if call else None, **payload, error=error.message)
    if call is not None and call.emit is not None:
        call.emit("llm.fallback", {**payload, "error": error.message, "call": call.call_id})
