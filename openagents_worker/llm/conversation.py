"""Conversations: the only place that repairs messages so that every chat API accepts them.

A model may invent tool names, leave out call ids, and write arguments that are not JSON. A provider rejects a
whole request if one of its messages breaks a rule. So messages are repaired before they are sent:

- Every message has content or tool calls. A user message without content gets `EMPTY_INPUT`. Other messages
  without content are left out, and so are blank text blocks.
- A tool name is 1 to 64 of a-z A-Z 0-9 _ -. Arguments are a JSON object. Each call id occurs once.
- A note about left-out messages is at the beginning of the next user message: many servers refuse a second
  system message.
- The results of a message's calls follow it, one for each call. A result without a call is left out.

A repair depends only on the messages before it and on the results of the repaired calls. So when a
conversation grows, its repaired beginning stays the same byte for byte, and a provider's prompt cache hits.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from openagents_worker.jsontext import dumps, loads, replaced, whole_text
from openagents_worker.llm.base import FixedMessage, LLMResponse, LLMToolCall, Message
from openagents_worker.llm.messages import (
    content_blocks,
    has_content,
    joined_content,
    tagged_instructions,
    without_empty,
)
from openagents_worker.models.omissions import is_omission_note

__all__ = [
    "EMPTY_INPUT",
    "UniqueCallIds",
    "assistant_message",
    "cut_calls",
    "is_blank",
    "repaired",
    "tool_call",
    "tool_name",
    "usable_calls",
    "user_text",
]

EMPTY_INPUT = "(empty message)"
"""Sent to the model instead of a user message without text, which providers reject."""
UNNAMED_TOOL = "unnamed_tool"
NO_RESULT = dumps({"error": "tool.no_result", "message": "the call has no result"})

_LEGAL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ILLEGAL = re.compile(r"[^a-zA-Z0-9_-]+")


def is_blank(content: Any) -> bool:
    """Whether a message's content is empty: nothing but white space, or a list of blocks without content."""
    return not has_content(content)


def user_text(text: str) -> str:
    """The user's text as it is sent to a model: `EMPTY_INPUT` if it is blank."""
    return EMPTY_INPUT if is_blank(text) else text


def tool_name(name: Any) -> str:
    """A tool name that chat APIs accept. Equal names give equal results.

    >>> tool_name("weather"), tool_name("get weather!"), tool_name(None)
    ('weather', 'get_weather', 'unnamed_tool')
    """
    if not isinstance(name, str):
        return UNNAMED_TOOL
    if _LEGAL_NAME.fullmatch(name):
        return name
    return _ILLEGAL.sub("_", name).strip("_")[:64] or UNNAMED_TOOL


class UniqueCallIds:
    """Assigns ids to tool calls so that each id occurs once in a conversation."""

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        used = (call.get("id") for message in messages for call in _calls_of(message))
        self._taken = {call_id for call_id in used if isinstance(call_id, str)}
        self._numbers: dict[str, int] = {}

    def take(self, wanted: Any, default: str) -> str:
        """The wanted id, or `default` if it is blank or not text. A number is appended if it is taken."""
        base = wanted if isinstance(wanted, str) and not is_blank(wanted) else default
        call_id, number = base, self._numbers.get(base, 1)
        while call_id in self._taken:
            number += 1
            call_id = f"{base}_{number}"
        self._taken.add(call_id)
        self._numbers[base] = number
        return call_id


def usable_calls(calls: Sequence[LLMToolCall], ids: UniqueCallIds, step: int) -> list[LLMToolCall]:
    """The calls of a reply, each with a unique id. A call without an id gets `call_{step}_{index}`."""
    taken = [ids.take(call.id, f"call_{step}_{place}") for place, call in enumerate(calls, start=1)]
    return [
        call if call.id == call_id else replace(call, id=call_id)
        for call, call_id in zip(calls, taken, strict=True)
    ]


# --- messages --------------------------------------------------------------------------------------------


def assistant_message(reply: LLMResponse, calls: Sequence[LLMToolCall] = ()) -> FixedMessage:
    """The message of a reply with its usable calls, as the next request and the transcript contain it.

    It has blocks only if the text does not say everything: earlier versions send text only.
    """
    content = [dict(block) for block in reply.content] if _needs_blocks(reply) else reply.output_text
    message = FixedMessage(role="assistant", content=content)
    if calls:
        message["tool_calls"] = [_message_call(call) for call in calls]
    if reply.provider_fields:
        message["provider_fields"] = dict(reply.provider_fields)
    return message


def _message_call(call: LLMToolCall) -> dict[str, Any]:
    plain = {"id": call.id, "name": tool_name(call.name), "arguments": dict(call.arguments)}
    return plain | ({"provider_fields": dict(call.provider_fields)} if call.provider_fields else {})


def _needs_blocks(reply: LLMResponse) -> bool:
    """Whether a reply has a block that its provider wants back, or that is not text."""
    return any(map(_is_more_than_text, content_blocks(reply.content)))


def _is_more_than_text(block: Mapping[str, Any]) -> bool:
    if block.get("type") == "text":
        return bool(block.get("citations"))
    if block.get("type") == "reasoning":  # without opaque fields, it is only for people
        return any(block.get(name) for name in ("signature", "encrypted", "id"))
    return True


def repaired(messages: Sequence[Message]) -> list[Message]:
    """The messages in a form that every chat API accepts. Valid messages are returned as the same objects.

    Unknown roles are not repaired: they are a mistake in a pattern, and the provider reports them.
    """
    return list(_repaired_messages(messages))


def _repaired_messages(messages: Sequence[Message]) -> Iterator[Message]:
    """Each call is followed by one result for it. Results without a call and blank messages are left out."""
    ids = UniqueCallIds()
    messages = _without_notes(messages)
    for at, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if calls := _calls_of(message):
            yield from _calls_with_results(message, calls, _results_after(messages, at), ids)
        elif role == "tool":
            continue  # already yielded with its call, or a result without a call
        elif not is_blank(content):
            yield _without_blank_blocks(message if "tool_calls" not in message else _without_calls(message))
        elif role == "user":
            yield {**message, "content": EMPTY_INPUT}


def _without_notes(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages with each note about left-out messages in the user message behind it, or as one."""
    if not any(map(is_omission_note, messages)):
        return messages
    kept: list[Message] = []
    noted = None
    for message in messages:
        if is_omission_note(message):
            noted = tagged_instructions(message.get("content"))
            kept.append({"role": "user", "content": noted})
            continue
        if noted is not None and message.get("role") == "user":
            kept.pop()
            text = EMPTY_INPUT if is_blank(message.get("content")) else message["content"]
            message = {**message, "content": joined_content(noted, text)}
        noted = None
        kept.append(message)
    return kept


def _calls_of(message: Message) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls") if message.get("role") == "assistant" else None
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list | tuple) else []


def _without_calls(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "tool_calls"}


def _without_blank_blocks(message: Message) -> Message:
    content = message.get("content")
    kept = without_empty(content)
    return message if kept is content else {**message, "content": kept}


def _results_after(messages: Sequence[Message], at: int) -> dict[str, deque[Message]]:
    """The tool results between this message and the next assistant message, by `repr` of their call id."""
    found: dict[str, deque[Message]] = defaultdict(deque)
    for place in range(at + 1, len(messages)):
        message = messages[place]
        if message.get("role") == "assistant":
            break
        if message.get("role") == "tool":
            found[repr(message.get("tool_call_id"))].append(message)
    return found


def _calls_with_results(
    message: Message,
    calls: Sequence[Mapping[str, Any]],
    results: Mapping[str, deque[Message]],
    ids: UniqueCallIds,
) -> Iterator[Message]:
    """An assistant message with repaired calls, followed by one result for each call."""
    sent, answers = [], []
    for place, call in enumerate(calls, start=1):
        call_id = ids.take(call.get("id"), f"call_{place}")
        waiting = results.get(repr(call.get("id")))
        sent.append(_repaired_call(call, call_id))
        answers.append(_result(waiting.popleft() if waiting else None, call_id, sent[-1]))
    message = _without_blank_blocks(message)
    yield message if sent == list(message["tool_calls"]) else {**message, "tool_calls": sent}
    yield from answers


def _repaired_call(call: Mapping[str, Any], call_id: str) -> Mapping[str, Any]:
    """The call with this id, a valid name and valid arguments."""
    if isinstance(function := call.get("function"), Mapping):  # in OpenAI's wire format
        arguments = function.get("arguments")
        valid = arguments if _is_object_text(arguments) else "{}"
        return {
            **call,
            "id": call_id,
            "function": {**function, "name": tool_name(function.get("name")), "arguments": valid},
        }
    arguments = call.get("arguments")
    return {
        **call,
        "id": call_id,
        "name": tool_name(call.get("name")),
        "arguments": arguments if isinstance(arguments, Mapping) else {},
    }


def _result(result: Message | None, call_id: str, call: Mapping[str, Any]) -> Message:
    """The result with the id and name of its repaired call; `NO_RESULT` if it is missing."""
    name = call["name"] if "name" in call else call["function"]["name"]
    if result is None:
        return {"role": "tool", "tool_call_id": call_id, "name": name, "content": NO_RESULT, "is_error": True}
    changed = {"tool_call_id": call_id} | ({"name": name} if "name" in result else {})
    return result if changed.items() <= result.items() else {**result, **changed}


def _is_object_text(text: Any) -> bool:
    try:
        return isinstance(text, str) and isinstance(loads(text), dict)
    except ValueError:
        return False


def tool_call(call_id: str | None, name: Any, raw: Any) -> LLMToolCall:
    """Parse a tool call from the name and arguments that the model wrote. A name that is not text becomes "".
    If the arguments cannot be parsed, `parse_error` says why."""
    name = whole_text(name) if isinstance(name, str) else ""
    if raw is None or (isinstance(raw, str) and raw.strip() in ("", "null")):  # a tool without parameters
        return LLMToolCall(name, {}, call_id)
    try:
        arguments = replaced(loads(raw) if isinstance(raw, str) else raw)
    except (TypeError, ValueError) as error:
        problem = f"the arguments are not JSON: {error}"
    else:
        if isinstance(arguments, dict):
            return LLMToolCall(name, arguments, call_id)
        problem = f"the arguments are a JSON {type(arguments).__name__}, not an object"
    return LLMToolCall(name, {}, call_id, raw_arguments=_raw_text(raw), parse_error=problem)


def cut_calls(calls: Sequence[LLMToolCall]) -> list[LLMToolCall]:
    """The calls of a reply that was cut in the last one. Nobody may execute that one: the model has not
    written all its arguments."""
    *whole, last = calls
    if last.parse_error is None:
        raw = dumps(dict(last.arguments)) if last.arguments else ""
        problem = "the reply was cut before the arguments were complete"
        last = replace(last, arguments={}, raw_arguments=raw, parse_error=problem)
    return [*whole, last]


def _raw_text(raw: Any) -> str:
    """Invalid arguments as text, for people who inspect the call."""
    try:
        return whole_text(raw) if isinstance(raw, str) else dumps(replaced(raw))
    except (TypeError, ValueError):
        return ""
