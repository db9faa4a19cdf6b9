"""Strict chat servers: the only place that knows what they refuse of OpenAI's format, and what they accept.

OpenAI takes the messages of a conversation in almost any order. Other servers with the same API have rules,
most of them in the chat template of the model. A request is sent in OpenAI's form first. If the error names a
rule, the request is repeated in a form that obeys it, and the client sends that form to this model from then
on. A refused request is not billed.

| rule | who has it |
|---|---|
| system messages are at the beginning | Qwen, Mistral |
| roles alternate; no user message directly after the result of a tool | Mistral, Gemma |
| the id of a call is nine letters and digits | Mistral |
| a reply has a text or calls, not both | Mistral |
| the content of a reply with calls is not null | Ollama, LM Studio |
| no message is a system message | Gemma 2 |
| the result of a tool names the tool | Gemini behind Ollama and gateways |
| the result of a tool has no image | DeepSeek and other models for text |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from hashlib import blake2b
from typing import Any

from openagents_worker.llm.messages import Message, content_blocks, joined_content, tagged_instructions

__all__ = [
    "BRIDGE",
    "StrictForm",
    "forms_in",
    "in_form",
    "joined_instructions",
    "prepared",
]

Wire = dict[str, Any]

BRIDGE = "…"
"""The reply between a tool's result and a user message."""
NO_IMAGE = {"type": "text", "text": "[image left out: the model takes no images]"}
INSTRUCTIONS = ("system", "developer")
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")


class StrictForm(StrEnum):
    """What is different from OpenAI's form in a request."""

    ROLES_IN_ORDER = "roles_in_order"
    SHORT_CALL_IDS = "short_call_ids"
    CALLS_WITHOUT_TEXT = "calls_without_text"
    NO_NULL_CONTENT = "no_null_content"
    NO_SYSTEM_ROLE = "no_system_role"
    NAMED_RESULTS = "named_results"
    NO_IMAGES_IN_RESULTS = "no_images_in_results"


_ERROR_TEXTS = {
    StrictForm.ROLES_IN_ORDER: (
        r"unexpected role .{1,20} after role|roles must alternate"
        r"|system messages? (must|should|can only) be .{0,20}(beginning|first|start)"
    ),
    StrictForm.SHORT_CALL_IDS: r"tool call id .{0,200}a-z, A-Z, 0-9, with a length of 9",
    StrictForm.CALLS_WITHOUT_TEXT: r"either content or tool_calls, but not both",
    StrictForm.NO_NULL_CONTENT: (
        r"content type: <nil>|'content' field must be a string|'content': expected a string, got null"
    ),
    StrictForm.NO_SYSTEM_ROLE: r"system role (is )?not supported|does not support 'system' with this model",
    StrictForm.NAMED_RESULTS: r"function_response\.name: (name cannot be empty|\[REQUIRED)",
    StrictForm.NO_IMAGES_IN_RESULTS: (
        r"unknown variant .image_url|not a multimodal model|at most 0 image|support image (input|content)"
        r"|image (input|content) is not (supported|enabled)|image_url.{1,40}not supported"
        r"|content' : value must be a string"
    ),
}
_PATTERNS = {form: re.compile(text, re.IGNORECASE | re.DOTALL) for form, text in _ERROR_TEXTS.items()}


def forms_in(error: str) -> frozenset[StrictForm]:
    """The forms that the text of an error asks for.

    >>> sorted(forms_in("Unexpected role 'user' after role 'tool'"))
    [<StrictForm.ROLES_IN_ORDER: 'roles_in_order'>]
    """
    return frozenset(form for form, pattern in _PATTERNS.items() if pattern.search(error))


def prepared(messages: Iterable[Message], forms: Iterable[str]) -> list[Message]:
    """Neutral messages in these forms, as far as they differ before the conversion to chat completions."""
    asked = frozenset(forms)
    if StrictForm.SHORT_CALL_IDS in asked:
        messages = map(_with_short_ids, messages)
    if StrictForm.NO_IMAGES_IN_RESULTS in asked:
        messages = map(_without_images, messages)
    return list(messages)


def _with_short_ids(message: Message) -> Message:
    """The message with ids of nine letters and digits. Equal ids stay equal."""
    if message.get("role") == "tool":
        return {**message, "tool_call_id": _short_id(message.get("tool_call_id"))}
    if calls := message.get("tool_calls"):
        return {**message, "tool_calls": [{**call, "id": _short_id(call.get("id"))} for call in calls]}
    return message


def _short_id(call_id: Any) -> str:
    text = str(call_id)
    if _SHORT_ID.fullmatch(text):
        return text
    return blake2b(text.encode(errors="surrogatepass"), digest_size=5).hexdigest()[:9]


def _without_images(message: Message) -> Message:
    content = message.get("content")
    if message.get("role") != "tool" or not isinstance(content, list | tuple):
        return message
    blocks = [NO_IMAGE if block.get("type") == "image" else block for block in content_blocks(content)]
    return {**message, "content": blocks}


# --- messages in the format of chat completions ----------------------------------------------------------


def joined_instructions(messages: Sequence[Wire]) -> list[Wire]:
    """The messages with the system messages at their beginning as one: some chat templates take only one."""
    joined: list[Wire] = []
    for message in messages:
        begins = len(joined) == 1 and message["role"] in INSTRUCTIONS
        if begins and joined[0]["role"] == message["role"]:
            joined[0] = _joined(joined[0], message)
        else:
            joined.append(message)
    return joined


def in_form(messages: Iterable[Wire], forms: Iterable[str]) -> list[Wire]:
    """The messages in these forms."""
    asked = frozenset(forms)
    if StrictForm.CALLS_WITHOUT_TEXT in asked:  # a second message for the text would be joined by the server
        messages = ({**each, "content": None} if each.get("tool_calls") else each for each in messages)
    if StrictForm.NAMED_RESULTS in asked:
        messages = _with_names(list(messages))
    if asked & {StrictForm.ROLES_IN_ORDER, StrictForm.NO_SYSTEM_ROLE}:
        messages = _in_order(messages, keeps_first=StrictForm.NO_SYSTEM_ROLE not in asked)
    if StrictForm.NO_NULL_CONTENT in asked:
        messages = ({**each, "content": ""} if each.get("content") is None else each for each in messages)
    return list(messages)


def _with_names(messages: Sequence[Wire]) -> list[Wire]:
    """The messages with the name of the tool in each result."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    names = {call["id"]: call["function"]["name"] for call in calls}
    return [
        {**message, "name": names[message["tool_call_id"]]} if message["role"] == "tool" else message
        for message in messages
    ]


def _in_order(messages: Iterable[Wire], *, keeps_first: bool) -> list[Wire]:
    """Later instructions become text of the user. Adjacent messages of one role become one. A reply is put
    between a tool's result and a user message."""
    ordered: list[Wire] = []
    at_the_beginning = keeps_first
    for message in messages:
        before = ordered[-1]["role"] if ordered else None
        at_the_beginning = at_the_beginning and message["role"] in INSTRUCTIONS
        if message["role"] in INSTRUCTIONS and not at_the_beginning:
            message = {"role": "user", "content": tagged_instructions(message["content"])}
        if message["role"] == "user" and before == "tool":
            ordered.append({"role": "assistant", "content": BRIDGE})
        if ordered and _can_be_joined(ordered[-1], message):
            ordered[-1] = _joined(ordered[-1], message)
        else:
            ordered.append(message)
    return ordered


def _can_be_joined(first: Wire, second: Wire) -> bool:
    has_calls = first.get("tool_calls") or second.get("tool_calls")
    return first["role"] == second["role"] != "tool" and not has_calls


def _joined(first: Wire, second: Wire) -> Wire:
    return {**first, **second, "content": joined_content(first["content"], second["content"])}
