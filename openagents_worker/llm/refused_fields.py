"""Opaque fields that a provider refuses or misses: the only place that decides how a request is repeated.

A conversation may hold opaque fields that its provider does not take back. Another provider with the same
wire format wrote them, before a fallback or a change of the agent: Groq and Mistral refuse
`reasoning_content`, OpenAI the `encrypted_content` of another account. Or the messages before them have
changed since: Anthropic binds thinking to all that precedes it
(https://docs.anthropic.com/en/docs/build-with-claude/preserved-thinking).

The request is then repeated without the fields of earlier turns, because only the current turn needs its own.
If it is refused again, it is repeated without all of them. A refused request is not billed.

A provider may also miss fields of replies that another model has written: Kimi and DeepSeek want
`reasoning_content` on each of them, Gemini a thought signature on the first call. It gets placeholders:
Gemini has one for this purpose (https://ai.google.dev/gemini-api/docs/thought-signatures).
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
from openagents_worker.llm.messages import fields_of_format
from openagents_worker.llm.openai_chat_replies import WIRE_FORMAT

__all__ = ["MAX_REPAIRS", "RefusedFields"]

MAX_REPAIRS = 4
"""How often a request is repeated for its fields. A provider could miss what it refuses."""

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
_MISSED_REASONING = re.compile(
    r"reasoning.content.{0,80}(missing|must be passed back)|missing.{0,40}reasoning.content",
    re.IGNORECASE | re.DOTALL,
)
_MISSED_SIGNATURE = re.compile(r"missing.{0,20}thought.?signature", re.IGNORECASE)
NO_REASONING = "."
"""The reasoning of a reply that has none. Kimi takes an empty text for a missing one."""
NO_SIGNATURE = {"google": {"thought_signature": "skip_thought_signature_validator"}}
_REASONING_BLOCKS = ("reasoning", "thinking", "redacted_thinking")
_KEPT = {
    "anthropic_messages": ("caller", "container", "toolset_name"),
    "responses": ("async", "caller", "namespace"),
}
"""What says where a call comes from, by wire format. No provider refuses it."""


class RefusedFields:
    """What one provider has refused, and missed."""

    def __init__(self) -> None:
        self._remembered: dict[bytes, None] = {}
        self._misses_reasoning = self._misses_signatures = False

    def usable(self, request: ModelRequest) -> ModelRequest:
        """The request without the opaque fields that have been refused before, and with those that have been
        missed."""
        if self._remembered:
            end = _begin_of_turn(request.messages)
            if _digest(request.messages[:end]) in self._remembered:
                request = replace(request, messages=_without_fields(request.messages, end))
        return self._completed(request)

    def _completed(self, request: ModelRequest) -> ModelRequest:
        if not (self._misses_reasoning or self._misses_signatures):
            return request
        messages = [
            _completed(message, reasoning=self._misses_reasoning, signature=self._misses_signatures)
            for message in request.messages
        ]
        return replace(request, messages=messages)

    def repaired(self, request: ModelRequest, error: LLMError) -> ModelRequest | None:
        """The request to send after this error. None: the error has another reason."""
        if not _is_of_request(error):
            return None
        if _MISSED_REASONING.search(error.message) or _MISSED_SIGNATURE.search(error.message):
            self._misses_reasoning |= _MISSED_REASONING.search(error.message) is not None
            self._misses_signatures |= _MISSED_SIGNATURE.search(error.message) is not None
            completed = self._completed(request)
            return None if completed.messages == list(request.messages) else completed
        if _MISSING.search(error.message) or not _REFUSED.search(error.message):
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


def _is_of_request(error: LLMError) -> bool:
    is_refusing = isinstance(error, LLMResponseError) and error.status in _REFUSING_STATUS
    return is_refusing and not error.is_partial


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


# --- missed fields ---------------------------------------------------------------------------------------


def _completed(message: Message, *, reasoning: bool, signature: bool) -> Message:
    """A message of the assistant with placeholders for what it has not; others are unchanged."""
    if message.get("role") != "assistant":
        return message
    completed = dict(message)
    if reasoning and not fields_of_format(message, WIRE_FORMAT).get("reasoning_content"):
        completed = _with_field(completed, "reasoning_content", NO_REASONING)
    calls = message.get("tool_calls")
    if signature and isinstance(calls, list | tuple) and calls and isinstance(calls[0], Mapping):
        first = calls[0]
        if "function" in first:  # in the format of chat completions: its fields are sent as they are
            first = {"extra_content": NO_SIGNATURE, **first}
        elif not fields_of_format(first, WIRE_FORMAT).get("extra_content"):
            first = _with_field(first, "extra_content", NO_SIGNATURE)
        completed["tool_calls"] = [first, *calls[1:]]
    return message if completed == message else completed


def _with_field(holder: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    every = holder.get("provider_fields")
    own = {**fields_of_format(holder, WIRE_FORMAT), name: value}
    return {**holder, "provider_fields": {**(every if isinstance(every, Mapping) else {}), WIRE_FORMAT: own}}
