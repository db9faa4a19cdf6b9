"""The contract of a wire format (one provider's API), so that scripts and faults work with every provider."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import LLMUsage
from openagents_worker.llm.script import ScriptedCall, ScriptedReply
from openagents_worker.llm.scripted import usage_of
from openagents_worker.testing.model_server.connection import ReceivedRequest

__all__ = [
    "Event",
    "ModelServerRequest",
    "Reply",
    "InvalidRequest",
    "WireFormat",
    "call_id",
    "conversation_digest",
    "fragments",
    "seal",
    "turn_number",
    "written_arguments",
]


@dataclass(frozen=True, slots=True)
class ModelServerRequest:
    """A request to the model. Header names are in lower case.

    `messages` and `tools` have OpenAI's format, whatever the API of the request. `body` is the original
    request body.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    model: str
    stream: bool
    headers: Mapping[str, str]
    n: int
    """The number of this turn: how many assistant messages follow the last user message."""
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to one request. `number` is unique for the server."""

    number: int
    created: int
    """Unix time in seconds."""
    request: ModelServerRequest
    entry: ScriptedReply

    @property
    def usage(self) -> LLMUsage:
        return usage_of(self.entry, self.request.messages)

    def used_up(self, max_tokens: int | None) -> bool:
        """Whether the script sets exactly `max_tokens` output tokens: then the reply counts as cut off."""
        usage = self.entry.usage
        return max_tokens is not None and usage is not None and usage.output_tokens == max_tokens


class Event(NamedTuple):
    """A server-sent event."""

    data: str
    name: str | None = None


class InvalidRequest(Exception):
    """The request is not valid in this wire format. The text is the provider's error message."""


class WireFormat(Protocol):
    """How one provider's requests are read and its replies written."""

    path: str

    def read(self, request: ReceivedRequest) -> ModelServerRequest:
        """Parse and check a request. Raises `InvalidRequest`."""
        ...

    def headers(self, number: int) -> dict[str, str]:
        """Headers of every answer, also of errors."""
        ...

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        ...

    def opening(self, reply: Reply) -> Iterator[Event]:
        """The events at the beginning of a stream, before any content."""
        ...

    def pieces(self, reply: Reply) -> Iterator[Event]:
        """The events with content: words, then the name and the arguments of each call."""
        ...

    def closing(self, reply: Reply) -> Iterator[Event]:
        """The events at the end of a stream. Without the last one, the stream is incomplete."""
        ...

    def error(self, status: int, message: str, number: int) -> dict[str, Any]:
        """The body of an error."""
        ...

    def failed(self, reply: Reply, message: str) -> dict[str, Any]:
        """The body of an answer with status 200 that reports an error."""
        ...

    def failed_event(self, reply: Reply, message: str, number: int) -> Event:
        """The event of a stream that reports an error. `number`: how many events precede it."""
        ...


def turn_number(messages: Sequence[Mapping[str, Any]]) -> int:
    """The number of assistant messages after the last user message."""
    roles = [message["role"] for message in messages]
    last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    return roles[last_user + 1 :].count("assistant")


def conversation_digest(messages: Sequence[Mapping[str, Any]]) -> str:
    """A hash that identifies a conversation. It is the same for every try of a call."""
    return hashlib.sha256(dumps(messages).encode("utf-8", "replace")).hexdigest()


def call_id(reply: Reply, index: int, call: ScriptedCall, prefix: str) -> str:
    """The id of a call: its own, or one that is unique in the conversation and the same on every try."""
    if call.id is not None:
        return call.id
    return f"{prefix}{conversation_digest(reply.request.messages)[:16]}_{index}"


def seal(text: str) -> str:
    """The signature of a reasoning text. With it, the server recognises a reasoning that it has sent."""
    return "seal_" + hashlib.sha256(b"reasoning:" + text.encode("utf-8", "replace")).hexdigest()[:32]


def written_arguments(call: ScriptedCall) -> str:
    """The arguments as text. A script may contain text that is not JSON."""
    return call.arguments if isinstance(call.arguments, str) else dumps(call.arguments)


def fragments(text: str) -> list[str]:
    """Split the text of arguments into the pieces in which it is streamed."""
    return [text[at : at + 8] for at in range(0, len(text), 8)]
