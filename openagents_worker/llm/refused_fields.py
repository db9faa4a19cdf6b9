"""Opaque fields that a provider refuses or misses: the only place that decides how a request is repeated.

A conversation may hold opaque fields that its provider does not take back. Another provider with the same
wire format wrote them, before a fallback or a change of the agent: Groq and Mistral refuse
`reasoning_content`, OpenAI the `encrypted_content` of another account. Or the messages before them have
changed since: Anthropic binds thinking to all that precedes it
(https://docs.anthropic.com/en/docs/build-with-claude/preserved-thinking).

The request is then repeated without the fields of earlier turns, because only the current turn needs its own.
If it is refused again, it is repeated without all of them. A refused request is not billed.

Blocks of the provider's own tools (`server_tool_use`, `web_search_call`) are refused by any other provider.
The replies with a block of the type that the error names are repeated without such blocks.

A provider may also miss fields of replies that another model has written: Kimi and DeepSeek want
`reasoning_content` or thinking on each of them, Gemini a thought signature on the first call. It gets
placeholders:
Gemini has one for this purpose (https://ai.google.dev/gemini-api/docs/thought-signatures).

LiteLLM refuses a conversation with tool calls for Claude and Bedrock if the request offers no tools. The
tools that the conversation has called are then declared.

Rules about the order of messages and the like are in `openagents_worker.llm.strict_servers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openagents_worker.errors import LLMError, LLMResponseError
from openagents_worker.llm.base import Message, ModelRequest
from openagents_worker.llm.digest_memory import DigestMemory
from openagents_worker.llm.messages import BLOCK_TYPES, content_blocks, fields_of_format
from openagents_worker.llm.strict_servers import forms_in

__all__ = ["MAX_REPAIRS", "RefusedFields", "called_tools"]

MAX_REPAIRS = 4
"""How often a request is repeated for its fields. A provider could miss what it refuses."""

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
_MISSED_THINKING = re.compile(r"content\[\]\.thinking.{0,80}must be passed back", re.IGNORECASE | re.DOTALL)
_MISSED_SIGNATURE = re.compile(r"missing.{0,20}thought.?signature", re.IGNORECASE)
_MISSED_TOOLS = re.compile(r"without .{0,3}tools=|must define tools", re.IGNORECASE)
NO_REASONING = "."
"""The reasoning of a reply that has none. Kimi takes an empty text for a missing one."""
NO_SIGNATURE = {"google": {"thought_signature": "skip_thought_signature_validator"}}
CHAT, ANTHROPIC, THINKING = "chat_completions", "anthropic_messages", "thinking"
_REASONING_BLOCKS = ("reasoning", "thinking", "redacted_thinking")
_KEPT_BLOCKS = BLOCK_TYPES.union(
    _REASONING_BLOCKS,
    ("tool_use", "tool_result", "function_call", "function_call_output"),
    ("document", "image_url", "input_audio", "input_text", "output_text"),
)
"""The types of blocks that are of no provider's own tool. A pattern may write them."""
_KEPT = {
    "anthropic_messages": ("caller", "container", "toolset_name"),
    "responses": ("async", "caller", "namespace"),
}
"""What says where a call comes from, by wire format. No provider refuses it."""
_PLACES = ("calls_at", "phases")
"""Fields that count the blocks of their message."""


@dataclass(frozen=True, slots=True)
class _Refused:
    """What is left out of a conversation: the fields of its earlier turns, and blocks of these types."""

    fields: bool = False
    types: frozenset[str] = frozenset()

    def without(self, messages: Sequence[Message], end: int) -> list[Message]:
        shorter = _without_fields(messages, end) if self.fields else list(messages)
        return _without_blocks(shorter, self.types) if self.types else shorter


class RefusedFields:
    """What one provider has refused, and missed."""

    def __init__(self) -> None:
        self._remembered = DigestMemory[_Refused]()
        self._missed: set[re.Pattern[str]] = set()
        self._declares_called_tools = False
        self._strict_forms: dict[str | None, frozenset[str]] = {}

    def usable(self, request: ModelRequest) -> ModelRequest:
        """The request without what has been refused before, and with the fields that have been missed."""
        if self._remembered:
            end = _begin_of_turn(request.messages)
            if refused := self._remembered.get(_bare(request.messages[:end])):
                request = replace(request, messages=refused.without(request.messages, end))
        if forms := self._strict_forms.get(request.model):
            request = replace(request, strict_forms=forms)
        return self._completed(request)

    def _completed(self, request: ModelRequest) -> ModelRequest:
        messages = list(request.messages)
        for missed in self._missed:
            complete = _COMPLETE[missed]
            messages = [
                complete(message) if message.get("role") == "assistant" else message for message in messages
            ]
        if self._missed:
            request = replace(request, messages=messages)
        if self._declares_called_tools and not request.tools:
            request = replace(request, tools=called_tools(request.messages) or None)
        return request

    def repaired(self, request: ModelRequest, error: LLMError) -> ModelRequest | None:
        """The request to send after this error. None: the error has another reason."""
        if forms := _strict_forms_in(error) - request.strict_forms:
            known = self._strict_forms.get(request.model, frozenset()) | forms
            self._strict_forms[request.model] = known
            return replace(request, strict_forms=request.strict_forms | known)
        if not _is_of_request(error):
            return None
        if missed := {each for each in _COMPLETE if each.search(error.message)}:
            self._missed |= missed
            completed = self._completed(request)
            return None if completed.messages == list(request.messages) else completed
        if _MISSED_TOOLS.search(error.message):
            self._declares_called_tools = True
            completed = self._completed(request)
            return completed if completed.tools and not request.tools else None
        messages, end = request.messages, _begin_of_turn(request.messages)
        if types := _refused_types(messages, error.message):
            return replace(request, messages=self._remember(messages, end, _Refused(types=types)))
        if _MISSING.search(error.message) or not _REFUSED.search(error.message):
            return None
        shorter = self._remember(messages, end, _Refused(fields=True))
        if shorter == list(messages):
            shorter = _without_fields(messages, len(messages))
        return None if shorter == list(messages) else replace(request, messages=shorter)

    def _remember(self, messages: Sequence[Message], end: int, refused: _Refused) -> list[Message]:
        """The messages without what was refused. Remembered if that is something."""
        shorter = refused.without(messages, end)
        if shorter != list(messages):
            bare = _bare(messages[:end])
            before = self._remembered.get(bare) or _Refused()
            together = _Refused(before.fields or refused.fields, before.types | refused.types)
            self._remembered.put(bare, together)
        return shorter


def called_tools(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Declarations of the tools that a conversation has called, for a request that offers none."""
    calls = [
        call.get("function") or call
        for message in messages
        for call in message.get("tool_calls") or ()
        if isinstance(call, Mapping)
    ]
    names = dict.fromkeys(call["name"] for call in calls if isinstance(call.get("name"), str))
    text = "Not available now: answer without it."
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    return [
        {"type": "function", "function": {"name": name, "description": text, "parameters": schema}}
        for name in names
    ]


def _is_of_request(error: LLMError) -> bool:
    is_refusing = isinstance(error, LLMResponseError) and error.status in _REFUSING_STATUS
    return is_refusing and not error.is_partial


def _strict_forms_in(error: LLMError) -> frozenset[str]:
    """The forms that an error asks for. Its status may also be 500, of a chat template, or 404."""
    is_refusing = isinstance(error, LLMResponseError) and not error.is_partial
    return forms_in(error.message) if is_refusing else frozenset()


def _begin_of_turn(messages: Sequence[Message]) -> int:
    """The position of the last message of the user; 0 without one."""
    return next((at for at in reversed(range(len(messages))) if messages[at].get("role") == "user"), 0)


def _bare(messages: Sequence[Message]) -> list[Message]:
    """The conversation without all that can be left out: it is the same for a repeated request."""
    return [_without_own_blocks(message) for message in _without_fields(messages, len(messages))]


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


# --- blocks of the provider's own tools ------------------------------------------------------------------


def _own_types(message: Message) -> set[str]:
    """The types of the blocks of a reply that a tool of its provider has left."""
    if message.get("role") != "assistant":
        return set()
    types = (block.get("type") for block in content_blocks(message.get("content")))
    return {each for each in types if isinstance(each, str) and each not in _KEPT_BLOCKS}


def _refused_types(messages: Sequence[Message], error: str) -> frozenset[str]:
    """The type of blocks in replies that an error names; the first one, because types that the provider
    accepts may follow. Empty if it names none."""
    places: dict[int, str] = {}
    for each in set[str]().union(*map(_own_types, messages)):
        if named := re.search(rf"(?<!\w){re.escape(each)}(?!\w)", error):
            places[named.start()] = each
    return frozenset({places[min(places)]}) if places else frozenset()


def _without_blocks(messages: Sequence[Message], types: frozenset[str]) -> list[Message]:
    """The messages; a reply with a block of these types loses all blocks of its provider's tools: they belong
    together."""
    return [_without_own_blocks(each) if types & _own_types(each) else each for each in messages]


def _without_own_blocks(message: Message) -> Message:
    if not _own_types(message):
        return message
    blocks = content_blocks(message.get("content"))
    kept = [block for block in blocks if block.get("type") in _KEPT_BLOCKS]
    every = message.get("provider_fields")
    fields = {
        wire_format: {name: value for name, value in own.items() if name not in _PLACES}
        for wire_format, own in (every.items() if isinstance(every, Mapping) else ())
        if isinstance(own, Mapping)
    }
    return {**message, "content": kept} | ({"provider_fields": fields} if fields else {})


# --- missed fields ---------------------------------------------------------------------------------------


def _with_reasoning(message: Message) -> Message:
    if fields_of_format(message, CHAT).get("reasoning_content"):
        return message
    return _with_field(message, CHAT, "reasoning_content", NO_REASONING)


def _with_thinking(message: Message) -> Message:
    if fields_of_format(message, ANTHROPIC).get(THINKING):
        return message
    return _with_field(message, ANTHROPIC, THINKING, NO_REASONING)


def _with_signature(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple) or not calls or not isinstance(calls[0], Mapping):
        return message
    first = calls[0]
    if "function" in first:  # in the format of chat completions: its fields are sent as they are
        first = {"extra_content": NO_SIGNATURE, **first}
    elif not fields_of_format(first, CHAT).get("extra_content"):
        first = _with_field(first, CHAT, "extra_content", NO_SIGNATURE)
    return {**message, "tool_calls": [first, *calls[1:]]}


def _with_field(holder: Mapping[str, Any], wire_format: str, name: str, value: Any) -> dict[str, Any]:
    every = holder.get("provider_fields")
    own = {**fields_of_format(holder, wire_format), name: value}
    return {**holder, "provider_fields": {**(every if isinstance(every, Mapping) else {}), wire_format: own}}


_COMPLETE: Mapping[re.Pattern[str], Callable[[Message], Message]] = {
    _MISSED_REASONING: _with_reasoning,
    _MISSED_THINKING: _with_thinking,
    _MISSED_SIGNATURE: _with_signature,
}
"""What is added to each message of the assistant, by the error that misses it."""
