"""The contract between the runtime and a model client: the only place that defines request and response.

Messages do not depend on the provider; `openagents_worker.llm.messages` defines them. Each provider's client
converts them to its own wire format.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol, Self

from openagents_worker.jsontext import LARGEST_COUNT
from openagents_worker.llm.current_call import CallInfo, current_call
from openagents_worker.llm.messages import Block, Message, reasoning_text
from openagents_worker.quick_init import quick_init

__all__ = [
    "CallInfo",
    "Delta",
    "DeltaKind",
    "FinishReason",
    "FixedMessage",
    "LLMClient",
    "LLMResponse",
    "LLMToolCall",
    "LLMUsage",
    "Message",
    "ModelClient",
    "ModelRequest",
    "OnDelta",
    "OnPiece",
    "token_count",
    "current_call",
]


class FinishReason(StrEnum):
    """Why a model ended its reply, in the words of no provider."""

    STOP = "stop"
    TOOL_CALLS = "tool_calls"
    LENGTH = "length"
    """The reply was cut: `max_tokens` or the model's context is used up."""
    CONTENT_FILTER = "content_filter"
    REFUSAL = "refusal"
    ERROR = "error"
    OTHER = "other"


class FixedMessage(dict[str, Any]):
    """A message that never changes after it was sent to a model, so its hash is computed only once."""


class DeltaKind(StrEnum):
    """What a piece of a streamed reply belongs to."""

    TEXT = "text"
    REASONING = "reasoning"
    ARGUMENTS = "tool_arguments"
    """The arguments of a tool call, as JSON text."""


@quick_init
@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed reply. `tool_call` is the number of its tool call in the reply, from 0, and
    `tool_name` the name of that call, as far as it is known."""

    kind: DeltaKind
    text: str
    tool_call: int = 0
    tool_name: str = ""


OnDelta = Callable[[str], Awaitable[None]]
"""Receives each piece of text as it arrives. It is awaited, so a slow reader slows down the stream."""
OnPiece = Callable[[Delta], Awaitable[None]]
"""Receives each piece of reasoning and of tool arguments as it arrives."""


def token_count(value: Any) -> int:
    """Convert a provider's token count to an integer from 0 to 2^53. A value that is not a number becomes 0.

    >>> token_count(-5), token_count(float("inf")), token_count("many")
    (0, 9007199254740992, 0)
    """
    if value is None:
        return 0
    if type(value) is int:  # the usual case
        return value if 0 <= value <= LARGEST_COUNT else 0 if value < 0 else LARGEST_COUNT
    try:
        return int(min(max(float(value), 0.0), LARGEST_COUNT))
    except (TypeError, ValueError, OverflowError):  # also NaN
        return 0


@quick_init
@dataclass(frozen=True, slots=True)
class LLMUsage:
    """Tokens of one reply. `metadata` may hold `cached_tokens`, `cache_creation_input_tokens`, `cost_usd`,
    `cost_breakdown` (USD by part), `retries` (failed tries before this one) and `ttft_ms` (time to first
    token, in milliseconds).

    Counts are limited to 0 to 2^53, whatever the client passes: a negative count would refund a budget.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for count in (self.input_tokens, self.output_tokens, self.total_tokens):
            if type(count) is not int or not 0 <= count <= LARGEST_COUNT:
                self._limit_counts()

    def _limit_counts(self) -> None:
        for name in ("input_tokens", "output_tokens", "total_tokens"):
            object.__setattr__(self, name, token_count(getattr(self, name)))


@quick_init
@dataclass(frozen=True, slots=True)
class LLMToolCall:
    """A tool call in a model's reply. If its arguments cannot be parsed, `arguments` is {} and `parse_error`
    says why. `provider_fields`: see `openagents_worker.llm.messages`."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None
    raw_arguments: str | None = None
    parse_error: str | None = None
    type: str = "tool_call"
    provider_fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@quick_init
@dataclass(frozen=True, slots=True)
class LLMResponse:
    """One complete reply of a model.

    `finish_reason` is one of `FinishReason`, or None if the client does not say why the reply ended;
    `stop_reason` is the provider's own word for it. `output_text` is the text of the reply. `content` has
    the reply as blocks if it is more than this text, for example reasoning with a signature. `request_id` is
    the provider's id of the HTTP request.
    """

    output_text: str = ""
    tool_calls: Sequence[LLMToolCall] = ()
    usage: LLMUsage | None = None
    stop_reason: str | None = None
    structured_output: Any = None
    model: str | None = None
    provider: str | None = None
    response_id: str | None = None
    content: Sequence[Block] = ()
    finish_reason: str | None = None
    provider_fields: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    request_id: str | None = None

    @property
    def reasoning_text(self) -> str:
        """The reasoning that the model showed, as text; "" if it showed none."""
        return reasoning_text(self.content, self.provider_fields)

    def to_wire(self) -> dict[str, Any]:
        """The reply as plain JSON, as the journal stores it. Empty fields are left out.

        The opaque fields of the calls stand in a list of their own, because earlier versions reject unknown
        fields of a call.
        """
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
        optional = {
            "stop_reason": self.stop_reason,
            "structured_output": self.structured_output,
            "model": self.model,
            "provider": self.provider,
            "response_id": self.response_id,
            "content": [dict(block) for block in self.content] or None,
            "finish_reason": _plain_text(self.finish_reason),
            "provider_fields": dict(self.provider_fields) or None,
            "request_id": self.request_id,
            "tool_call_fields": _call_fields_to_wire(self.tool_calls),
        }
        return wire | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_wire(cls, data: Mapping[str, Any]) -> Self:
        usage = data.get("usage")
        return cls(
            output_text=data.get("output_text", ""),
            tool_calls=_calls_from_wire(data),
            usage=None if usage is None else LLMUsage(**usage),
            stop_reason=data.get("stop_reason"),
            structured_output=data.get("structured_output"),
            model=data.get("model"),
            provider=data.get("provider"),
            response_id=data.get("response_id"),
            content=tuple(data.get("content", ())),
            finish_reason=data.get("finish_reason"),
            provider_fields=data.get("provider_fields", {}),
            request_id=data.get("request_id"),
        )


def _plain_text(text: Any) -> Any:
    """The text of a member of a `StrEnum`, which is plain JSON; another value is returned as it is."""
    return str.__str__(text) if isinstance(text, str) else text


def _call_to_wire(call: LLMToolCall) -> dict[str, Any]:
    wire: dict[str, Any] = {"id": call.id, "name": call.name, "arguments": dict(call.arguments)}
    if call.parse_error:
        wire |= {"raw_arguments": call.raw_arguments, "parse_error": call.parse_error}
    return wire


def _call_fields_to_wire(calls: Sequence[LLMToolCall]) -> list[dict[str, Any]] | None:
    """The opaque fields of all calls, in their order; None if no call has any."""
    fields = [dict(call.provider_fields) for call in calls]
    return fields if any(fields) else None


def _calls_from_wire(data: Mapping[str, Any]) -> tuple[LLMToolCall, ...]:
    calls = [LLMToolCall(**call) for call in data.get("tool_calls", ())]
    if not (fields := data.get("tool_call_fields")):
        return tuple(calls)
    return tuple(replace(call, provider_fields=own) for call, own in zip(calls, fields, strict=True))


@quick_init
@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One request to a model. A field that is None takes the agent's `llm` option or the provider's default.

    `on_delta` is set if the reply may be watched. A provider that cannot stream ignores it. `on_piece` gets
    the pieces of a streamed reply that are not text.
    """

    messages: Sequence[Message]
    model: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: Mapping[str, Any] | str | None = None
    response_format: Mapping[str, Any] | None = None
    on_delta: OnDelta | None = field(default=None, repr=False, compare=False)
    on_piece: OnPiece | None = field(default=None, repr=False, compare=False)
    strict_forms: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    """The rules of its server that the client has learned, see `openagents_worker.llm.strict_servers`."""

    @property
    def is_streamed(self) -> bool:
        """Whether somebody listens to the pieces of the reply."""
        return self.on_delta is not None or self.on_piece is not None

    def with_listeners(self, on_delta: OnDelta | None, on_piece: OnPiece | None) -> ModelRequest:
        """The same request with these listeners."""
        return ModelRequest(
            self.messages,
            self.model,
            self.temperature,
            self.max_tokens,
            self.tools,
            self.tool_choice,
            self.response_format,
            on_delta,
            on_piece,
        )

    def content(self) -> dict[str, Any]:
        """All fields except the listeners, under the parameter names of `LLMClient.generate`."""
        return {
            "messages": self.messages,
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "tools": self.tools,
            "tool_choice": self.tool_choice,
            "response_format": self.response_format,
        }

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for a client's `generate`. A third-party client may not have the newer
        parameters, so those are left out if they are None."""
        arguments = {**self.content(), "on_delta": self.on_delta}
        return {name: value for name, value in arguments.items() if name in _ALWAYS or value is not None}


_ALWAYS = frozenset(("messages", "model", "temperature", "max_tokens", "tools"))


class LLMClient(Protocol):
    """A model client. There is one instance per agent and process. Many runs use it at the same time, so it
    must not store the state of a run.

    `on_delta` is set if the reply may be watched. A provider that cannot stream ignores it. `generate` raises
    `LLMRateLimitError`, `LLMConnectionError` (both retryable, after the client's own retries) or
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
    """Base of this library's clients: `generate` packs its arguments into one `ModelRequest`."""

    provider_name: str
    model_id: str
    is_billed: bool = True
    """Whether somebody bills the calls, so that an unknown price is worth an event."""
    limits_each_try: bool = False
    """Whether the client itself keeps `llm.limits`, for each try of a call."""

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
        """The model's reply; see `LLMClient`."""
        request = ModelRequest(
            messages, model, temperature, max_tokens, tools, tool_choice, response_format, on_delta
        )
        return await self.respond(request)

    async def respond(self, request: ModelRequest) -> LLMResponse:
        """The model's reply to the request. Subclasses implement it."""
        raise NotImplementedError

    def largest_cost_usd(self, request: ModelRequest) -> float | None:
        """What the request costs in USD if its reply is as long as it may be; None: it is not known."""
        return None

    def has_noted(self, note: Mapping[str, Any]) -> bool:
        """Whether a call of this client has made the note (`CallInfo.note`), so that it can continue it."""
        return False

    async def cancel_noted(self, note: Mapping[str, Any], *, tenant: str | None) -> bool:
        """Cancel what a call has noted (`CallInfo.note`) and that goes on at the provider: its run is over.

        Returns whether the note is this client's. Raises an error if the provider does not accept it.
        """
        return False

    async def give_up_noted(self, note: Mapping[str, Any], *, tenant: str | None) -> None:
        """The same for a call that another client answers. A failure is logged."""
