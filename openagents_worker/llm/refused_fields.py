"""Opaque fields that a provider refuses: the only place that decides what a request is repeated without.

A conversation may hold opaque fields that its provider does not take back. Another provider with the same
wire format wrote them, before a fallback or a change of the agent: Groq and Mistral refuse
`reasoning_content`, OpenAI the `encrypted_content` of another account. Or the messages before them have
changed since: Anthropic binds thinking to all that precedes it
(https://docs.anthropic.com/en/docs/build-with-claude/preserved-thinking).

The request is then repeated without the fields of earlier turns, because only the current turn needs its own.
If it is refused again, it is repeated without all of them. A refused request is not billed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from openagents_worker.errors import LLMError, LLMResponseError
from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import Message, ModelRequest

__all__ = ["RefusedFields"]

MAX_REMEMBERED = 1_000
"""Conversations whose earlier turns were refused."""

_REFUSING_STATUS = frozenset({400, 422})
_REFUSED = re.compile(
    r"bound to a different conversation|invalid .{0,3}signature|thinking block must contain"
    r"|blocks .{0,80}cannot be modified|thought.?signature|encrypted.content|reasoning_content"
    r"|reasoning_details|thinking_blocks|extra_content|provider_specific_fields",
    re.IGNORECASE,
)
_MISSING = re.compile(r"missing|must be (passed|sent) back|not supported with this model", re.IGNORECASE)
"""Texts of errors that a request with fewer fields cannot avoid."""
_REASONING_BLOCKS = ("reasoning", "thinking", "redacted_thinking")
_KEPT = {
    "anthropic_messages": ("caller", "container", "toolset_name"),
    "responses": ("async", "caller", "namespace"),
}
"""What says where a call comes from, by wire format. No provider refuses it."""


class RefusedFields:
    """What one provider has refused."""

    def __init__(self) -> None:
        self._remembered: dict[bytes, None] = {}

    def usable(self, request: ModelRequest) -> ModelRequest:
        """The request without the opaque fields of earlier turns, if they have been refused before."""
        if self._remembered:
            end = _begin_of_turn(request.messages)
            if _digest(request.messages[:end]) in self._remembered:
                return replace(request, messages=_without_fields(request.messages, end))
        return request

    def without_refused(self, request: ModelRequest, error: LLMError) -> ModelRequest | None:
        """The request to send after this error. None: the error has another reason."""
        if not _is_refusal(error):
            return None
        messages, end = request.messages, _begin_of_turn(request.messages)
        shorter = _without_fields(messages, end)
        if shorter != list(messages):
            self._remember(_digest(messages[:end]))
            return replace(request, messages=shorter)
        shorter = _without_fields(messages, len(messages))
        return None if shorter == list(messages) else replace(request, messages=shorter)

    def _remember(self, digest: bytes) -> None:
        self._remembered[digest] = None
        if len(self._remembered) > MAX_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]


def _is_refusal(error: LLMError) -> bool:
    is_of_request = isinstance(error, LLMResponseError) and error.status in _REFUSING_STATUS
    if not is_of_request or error.is_partial or _MISSING.search(error.message):
        return False
    return _REFUSED.search(error.message) is not None


def _begin_of_turn(messages: Sequence[Message]) -> int:
    """The position of the last message of the user; 0 without one."""
    return next((at for at in reversed(range(len(messages))) if messages[at].get("role") == "user"), 0)


def _digest(messages: Sequence[Message]) -> bytes:
    return blake2b(dumps(list(messages)).encode("utf-8", "replace"), digest_size=16).digest()


def _without_fields(messages: Sequence[Message], end: int) -> list[Message]:
    """The messages, the first `end` of them without opaque fields."""
    return [_plain(message) if at < end else message for at, message in enumerate(messages)]


def _plain(message: Message) -> Message:
    """A message of the assistant without reasoning and opaque fields; others are unchanged."""
    if message.get("role") != "assistant":
        return message
    plain = _with_kept_fields(message)
    if isinstance(content := message.get("content"), list | tuple):
        plain["content"] = [block for block in content if not _is_reasoning(block)]
    if isinstance(calls := message.get("tool_calls"), list | tuple):
        plain["tool_calls"] = [
            _with_kept_fields(call) if isinstance(call, Mapping) else call for call in calls
        ]
    return message if plain == message else plain


def _is_reasoning(block: Any) -> bool:
    return isinstance(block, Mapping) and block.get("type") in _REASONING_BLOCKS


def _with_kept_fields(holder: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in holder.items() if name != "provider_fields"}
    every = holder.get("provider_fields")
    kept = {
        wire_format: own
        for wire_format, fields in (every.items() if isinstance(every, Mapping) else ())
        if isinstance(fields, Mapping)
        and (own := {name: fields[name] for name in _KEPT.get(wire_format, ()) if name in fields})
    }
    return plain | ({"provider_fields": kept} if kept else {})
