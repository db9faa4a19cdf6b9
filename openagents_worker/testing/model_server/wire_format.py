"""Wire formats: the only place that says what one has to do, so that scripts and faults need not know any."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import LLMUsage
from openagents_worker.llm.script import ScriptedCall, ScriptedReply
from openagents_worker.llm.scripted import usage_of
from openagents_worker.testing.model_server.connection import HttpRequest

__all__ = [
    "Event",
    "ModelRequest",
    "Reply",
    "Unreadable",
    "WireFormat",
    "digest",
    "fragments",
    "turn",
    "written_arguments",
]


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """What the model was asked. Header names are in lower case.

    `messages` and `tools` are OpenAI's, whatever the format of the request; `body` is the request as it came.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    model: str
    stream: bool
    headers: Mapping[str, str]
    n: int
    """Which turn this is: how many assistant messages follow the last user message."""
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model says to one request; `number` tells it from every other of this server."""

    number: int
    created: int
    """Unix time in seconds."""
    asked: ModelRequest
    entry: ScriptedReply

    @property
    def usage(self) -> LLMUsage:
        return usage_of(self.entry, self.asked.messages)

    def used_up(self, max_tokens: int | None) -> bool:
        """Whether the script says that the reply took all the tokens it might, so that it was cut there."""
        said = self.entry.usage
        return max_tokens is not None and said is not None and said.output_tokens == max_tokens


class Event(NamedTuple):
    """A server-sent event."""

    data: str
    name: str | None = None


class Unreadable(Exception):
    """The request is none of this format; the text is what the provider says then."""


class WireFormat(Protocol):
    """How one provider's requests are read and its replies written."""

    path: str

    def read(self, request: HttpRequest) -> ModelRequest:
        """Raises `Unreadable`."""
        ...

    def headers(self, number: int) -> dict[str, str]:
        """What every answer carries, refusals too."""
        ...

    def whole(self, reply: Reply) -> dict[str, Any]: ...

    def opening(self, reply: Reply) -> Iterator[Event]:
        """How a stream begins, before the model has said anything."""
        ...

    def pieces(self, reply: Reply) -> Iterator[Event]:
        """What the model says: words, then each call's name and its arguments."""
        ...

    def closing(self, reply: Reply) -> Iterator[Event]:
        """How a stream that is whole ends; without its last event it is torn."""
        ...

    def error(self, status: int, message: str, number: int) -> dict[str, Any]: ...


def turn(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many assistant messages follow the last user message."""
    roles = [message["role"] for message in messages]
    asked = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    return roles[asked + 1 :].count("assistant")


def digest(messages: Sequence[Mapping[str, Any]]) -> str:
    """What tells a conversation from others, the same for every try."""
    return hashlib.sha256(dumps(messages).encode("utf-8", "replace")).hexdigest()


def written_arguments(call: ScriptedCall) -> str:
    """The arguments as the model wrote them, which need not be JSON."""
    return call.arguments if isinstance(call.arguments, str) else dumps(call.arguments)


def fragments(text: str) -> list[str]:
    """The pieces in which arguments are streamed."""
    return [text[at : at + 8] for at in range(0, len(text), 8)]
