"""The contract between the runtime and a model: what goes in, what comes back, and which call it is.

Messages are neutral chat messages, the shape OpenAI's chat completions made common:
`{"role": "system" | "user", "content": str}`,
`{"role": "assistant", "content": str, "tool_calls": [{"id", "name", "arguments": {...}}]}` (one message a
turn, with all its calls) and `{"role": "tool", "tool_call_id", "name", "content": str[, "is_error": True]}`.
A provider turns them into its own wire format.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from openagents_worker.jsontext import LARGEST_COUNT

__all__ = [
    "CallInfo",
    "FixedMessage",
    "LLMClient",
    "LLMResponse",
    "LLMToolCall",
    "LLMUsage",
    "Message",
    "ModelClient",
    "ModelRequest",
    "OnDelta",
    "count",
    "current_call",
    "quiet_http_clients",
]

Message = Mapping[str, Any]


class FixedMessage(dict[str, Any]):
    """A message that its pattern never changes once the model was shown it: it is hashed only once."""


OnDelta = Callable[[str], Awaitable[None]]
"""Gets every piece of text as it arrives; awaited, so that a slow reader slows the stream."""


@dataclass(frozen=True, slots=True)
class CallInfo:
    """Which recorded call is being made. The runtime sets it around every call of a model or a tool."""

    run_id: str
    call_id: str
    idempotency_key: str
    ordinal: int
    """How many calls of models came before it on the way here, in its own branch and before that began: the
    same on every attempt. Branches that run side by side count on their own."""
    failed_tries: int = 0
    """How often this call has failed with a retryable error before, on any worker."""
    kind: str = ""
    """`model`, `tool` and so on; with `name` what a person would call it."""
    name: str = ""
    number: int = 0
    """1 for the first call of its kind that this attempt entered, 2 for the second …"""
    tell: Callable[[str, Mapping[str, Any]], None] | None = field(default=None, repr=False, compare=False)
    """Gives an event of the call, its name and payload, to whoever watches the run."""


current_call: ContextVar[CallInfo | None] = ContextVar("openagents_current_call", default=None)


def count(said: Any) -> int:
    """A number of tokens as it is counted, whatever a provider says: 0 to 2^53, and 0 for what is no number.

    >>> count(-5), count(float("inf")), count("many")
    (0, 9007199254740992, 0)
    """
    if type(said) is int:  # it nearly always is
        return said if 0 <= said <= LARGEST_COUNT else 0 if said < 0 else LARGEST_COUNT
    try:
        return int(min(max(float(said), 0.0), LARGEST_COUNT))
    except (TypeError, ValueError, OverflowError):  # also NaN
        return 0


@dataclass(frozen=True, slots=True)
class LLMUsage:
    """Tokens of one reply. `metadata` may hold `cached_tokens`, `cache_creation_input_tokens`, `cost_usd`,
    `cost_breakdown` (USD by part), `retries` (tries before this one), `ttft_ms`.

    Whatever client has counted them, they are 0 to 2^53: a negative number would give a budget back.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens", "total_tokens"):
            object.__setattr__(self, name, count(getattr(self, name)))


@dataclass(frozen=True, slots=True)
class LLMToolCall:
    """A tool call the model asks for. `arguments` is {} and `parse_error` says why when it was not JSON."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None
    raw_arguments: str | None = None
    parse_error: str | None = None
    type: str = "tool_call"


@dataclass(frozen=True, slots=True)
class LLMResponse:
    """One whole reply of a model."""

    output_text: str = ""
    tool_calls: Sequence[LLMToolCall] = ()
    usage: LLMUsage | None = None
    stop_reason: str | None = None
    structured_output: Any = None
    model: str | None = None
    provider: str | None = None
    response_id: str | None = None
    content: Sequence[Mapping[str, Any]] = ()

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON, the form in which the journal keeps a reply: what is empty is left out."""
        usage = self.usage
        wire: dict[str, Any] = {"output_text": self.output_text}
        if self.tool_calls:
            wire["tool_calls"] = [_call_to_wire(call) for call in self.tool_calls]
        if usage is not None:
            wire["usage"] = {
                "input_tokens": usage.input_tokens,
                "output_tokens": usage.output_tokens,
                "total_tokens": usage.total_tokens,
            }
            if metadata := {key: value for key, value in usage.metadata.items() if value not in (None, {})}:
                wire["usage"]["metadata"] = metadata
        more = {
            "stop_reason": self.stop_reason,
            "structured_output": self.structured_output,
            "model": self.model,
            "provider": self.provider,
            "response_id": self.response_id,
            "content": [dict(block) for block in self.content] or None,
        }
        return wire | {key: value for key, value in more.items() if value is not None}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Self:
        usage = data.get("usage")
        return cls(
            output_text=data.get("output_text", ""),
            tool_calls=tuple(LLMToolCall(**call) for call in data.get("tool_calls", ())),
            usage=None if usage is None else LLMUsage(**usage),
            stop_reason=data.get("stop_reason"),
            structured_output=data.get("structured_output"),
            model=data.get("model"),
            provider=data.get("provider"),
            response_id=data.get("response_id"),
            content=tuple(data.get("content", ())),
        )


def _call_to_wire(call: LLMToolCall) -> dict[str, Any]:
    wire: dict[str, Any] = {"id": call.id, "name": call.name, "arguments": dict(call.arguments)}
    if call.parse_error:
        wire |= {"raw_arguments": call.raw_arguments, "parse_error": call.parse_error}
    return wire


class _NotOfModelCalls(logging.Filter):
    """Drops what an HTTP client says of each request that a model's client makes: the run's events say it."""

    def filter(self, record: logging.LogRecord) -> bool:
        call = current_call.get()
        is_of_model_call = call is not None and call.kind == "model"
        is_wanted = logging.getLogger(record.name).level != logging.NOTSET
        return not is_of_model_call or is_wanted or record.levelno > logging.INFO


_NOT_OF_MODEL_CALLS = _NotOfModelCalls()


def quiet_http_clients() -> None:
    """Let httpx log no model calls, unless its own logger has been given a level; other requests are logged
    as ever."""
    for name in ("httpx", "httpx2"):
        logging.getLogger(name).addFilter(_NOT_OF_MODEL_CALLS)


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """What a model is asked. Whatever is None is left to the provider's default, or to the agent's `llm`.

    `on_delta` is given when somebody may be watching; a provider that cannot stream ignores it.
    """

    messages: Sequence[Message]
    model: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: Mapping[str, Any] | str | None = None
    response_format: Mapping[str, Any] | None = None
    on_delta: OnDelta | None = field(default=None, repr=False, compare=False)

    def content(self) -> dict[str, Any]:
        """What is asked, without who listens; under the names of `LLMClient.generate`."""
        return {name: getattr(self, name) for name in _CONTENT}

    def arguments(self) -> dict[str, Any]:
        """The arguments for a client's `generate`. A client of somebody else's may not know the newer ones:
        those are left out where they are None."""
        given = {**self.content(), "on_delta": self.on_delta}
        return {name: value for name, value in given.items() if name in _ALWAYS or value is not None}


_CONTENT = ("messages", "model", "temperature", "max_tokens", "tools", "tool_choice", "response_format")
_ALWAYS = frozenset(("messages", "model", "temperature", "max_tokens", "tools"))


class LLMClient(Protocol):
    """A model. One instance per agent and process, used by many runs at once: it keeps no run's state.

    `on_delta` is given when somebody may be watching; a provider that cannot stream ignores it. Raises
    `LLMRateLimitError`, `LLMConnectionError` (both retryable, after the provider's own retries) or
    `LLMResponseError`. Clients written for the original SDK, without `on_delta`, work too.
    """

    provider_name: str
    model_id: str

    async def generate(
        self,
        *,
        messages: list[dict[str, Any]],
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: dict[str, Any] | str | None = None,
        response_format: dict[str, Any] | None = None,
        on_delta: OnDelta | None = None,
    ) -> LLMResponse: ...

    def count_tokens(self, text: str) -> int: ...

    async def aclose(self) -> None: ...


class ModelClient:
    """Base of the clients of this library: `generate` takes its arguments apart no further than here."""

    provider_name: str
    model_id: str

    async def generate(
        self,
        *,
        messages: list[dict[str, Any]],
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: dict[str, Any] | str | None = None,
        response_format: dict[str, Any] | None = None,
        on_delta: OnDelta | None = None,
    ) -> LLMResponse:
        """The reply of the model; see `LLMClient`."""
        asked = ModelRequest(
            messages, model, temperature, max_tokens, tools, tool_choice, response_format, on_delta
        )
        return await self.respond(asked)

    async def respond(self, request: ModelRequest) -> LLMResponse:
        """The reply of the model to a request."""
        raise NotImplementedError
