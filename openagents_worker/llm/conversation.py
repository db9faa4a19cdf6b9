"""Conversations: the only place that makes messages such that every chat API accepts them.

What a model says has no rules: it invents names of tools, leaves ids out, writes arguments that are not JSON.
What the next request may hold has rules, and a provider refuses the whole request for one message that breaks
them. So messages are repaired before they are sent:

- Every message has text, or tool calls. A message of a user without text says so; others without text go.
- The name of a tool is 1 to 64 of a-z A-Z 0-9 _ -, its arguments are an object, its id occurs once.
- The results of a message's calls follow it, one for each call; a result without its call goes.

A repair depends on the messages before it and on the results of the calls it repairs, so a conversation that
grows keeps its beginning byte for byte, and a provider's prompt cache finds it.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from openagents_worker.jsontext import dumps, loads, replaced, whole_text
from openagents_worker.llm.base import LLMToolCall, Message

__all__ = [
    "EMPTY_INPUT",
    "CallIds",
    "is_blank",
    "repaired",
    "tool_call",
    "tool_name",
    "usable_calls",
    "user_text",
]

EMPTY_INPUT = "(empty message)"
"""What a model is shown in place of a user's message without text, which providers refuse."""
UNNAMED_TOOL = "unnamed_tool"
NO_RESULT = dumps({"error": "tool.no_result", "message": "the call has no result"})

_LEGAL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ILLEGAL = re.compile(r"[^a-zA-Z0-9_-]+")


def is_blank(content: Any) -> bool:
    """Whether a message's content says nothing: no text, white space, or no part."""
    return not content.strip() if isinstance(content, str) else not content


def user_text(text: str) -> str:
    """What a model is shown of a user's text."""
    return EMPTY_INPUT if is_blank(text) else text


def tool_name(name: Any) -> str:
    """The name as chat APIs accept it; the same for the same name.

    >>> tool_name("weather"), tool_name("get weather!"), tool_name(None)
    ('weather', 'get_weather', 'unnamed_tool')
    """
    if not isinstance(name, str):
        return UNNAMED_TOOL
    if _LEGAL_NAME.fullmatch(name):
        return name
    return _ILLEGAL.sub("_", name).strip("_")[:64] or UNNAMED_TOOL


class CallIds:
    """Ids of tool calls, each given once in a conversation."""

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        given = (call.get("id") for message in messages for call in _calls_of(message))
        self._taken = {call_id for call_id in given if isinstance(call_id, str)}
        self._numbers: dict[str, int] = {}

    def take(self, wanted: Any, otherwise: str) -> str:
        """The wanted id, `otherwise` where it is none, with a number behind it where it is taken."""
        base = wanted if isinstance(wanted, str) and not is_blank(wanted) else otherwise
        given, number = base, self._numbers.get(base, 1)
        while given in self._taken:
            number += 1
            given = f"{base}_{number}"
        self._taken.add(given)
        self._numbers[base] = number
        return given


def usable_calls(calls: Sequence[LLMToolCall], ids: CallIds, step: int) -> list[LLMToolCall]:
    """The calls of a reply with an id of their own each; one without gets one made of step and place."""
    return [
        replace(call, id=ids.take(call.id, f"call_{step}_{place}"))
        for place, call in enumerate(calls, start=1)
    ]


# --- messages --------------------------------------------------------------------------------------------


def repaired(messages: Sequence[Message]) -> list[Message]:
    """The messages as every chat API accepts them; those that break no rule are the same objects.

    Roles that no API knows are left to the provider's own error: they are a pattern's mistake.
    """
    return list(_repaired(messages))


def _repaired(messages: Sequence[Message]) -> Iterator[Message]:
    ids = CallIds()
    for at, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if calls := _calls_of(message):
            yield from _batch(message, calls, _results_after(messages, at), ids)
        elif role == "tool":
            continue  # it went with its call, or it has none
        elif not is_blank(content):
            yield message if "tool_calls" not in message else _without_calls(message)
        elif role == "user":
            yield {**message, "content": EMPTY_INPUT}


def _calls_of(message: Message) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls") if message.get("role") == "assistant" else None
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list | tuple) else []


def _without_calls(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "tool_calls"}


def _results_after(messages: Sequence[Message], at: int) -> dict[str, deque[Message]]:
    """The results between this message and the next one of the model, by the id of their call."""
    found: dict[str, deque[Message]] = defaultdict(deque)
    for place in range(at + 1, len(messages)):
        message = messages[place]
        if message.get("role") == "assistant":
            break
        if message.get("role") == "tool":
            found[repr(message.get("tool_call_id"))].append(message)
    return found


def _batch(
    message: Message,
    calls: Sequence[Mapping[str, Any]],
    results: Mapping[str, deque[Message]],
    ids: CallIds,
) -> Iterator[Message]:
    """A message with its calls, and a result for each of them."""
    sent, answers = [], []
    for place, call in enumerate(calls, start=1):
        call_id = ids.take(call.get("id"), f"call_{place}")
        waiting = results.get(repr(call.get("id")))
        sent.append(_with_legal_parts(call, call_id))
        answers.append(_result(waiting.popleft() if waiting else None, call_id, sent[-1]))
    yield message if sent == list(message["tool_calls"]) else {**message, "tool_calls": sent}
    yield from answers


def _with_legal_parts(call: Mapping[str, Any], call_id: str) -> Mapping[str, Any]:
    if isinstance(function := call.get("function"), Mapping):  # OpenAI's own form
        arguments = function.get("arguments")
        legal = arguments if _is_object_text(arguments) else "{}"
        return {
            **call,
            "id": call_id,
            "function": {**function, "name": tool_name(function.get("name")), "arguments": legal},
        }
    arguments = call.get("arguments")
    return {
        **call,
        "id": call_id,
        "name": tool_name(call.get("name")),
        "arguments": arguments if isinstance(arguments, Mapping) else {},
    }


def _result(result: Message | None, call_id: str, call: Mapping[str, Any]) -> Message:
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
    """A tool call from its name and arguments as the model wrote them. A name that is not text is no name;
    what is wrong with the arguments is `parse_error`."""
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
    return LLMToolCall(name, {}, call_id, raw_arguments=_shown(raw), parse_error=problem)


def _shown(raw: Any) -> str:
    """Arguments that cannot be used, for whoever looks."""
    try:
        return whole_text(raw) if isinstance(raw, str) else dumps(replaced(raw))
    except (TypeError, ValueError):
        return ""
