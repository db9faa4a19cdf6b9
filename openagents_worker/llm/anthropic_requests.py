"""Anthropic's requests: the only place that converts neutral messages and tools to the Messages API.

The reference is https://docs.anthropic.com/en/api/messages. Its rules: instructions are a field of their
own, roles alternate, the results of a turn's calls are at the beginning of the next user message, no text is
empty, and ids have letters, digits, `_` and `-` only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from openagents_worker.jsontext import loads
from openagents_worker.llm.base import Message
from openagents_worker.llm.conversation import EMPTY_INPUT, repaired
from openagents_worker.llm.media import Readable, file_text, with_readable_media
from openagents_worker.llm.messages import Block, content_blocks, fields_of_format, has_content
from openagents_worker.llm.root_schemas import accepted_function

__all__ = [
    "CALLS_AT",
    "CONTAINER",
    "THINKING",
    "WIRE_FORMAT",
    "add_breakpoints",
    "container_to_wire",
    "in_container",
    "messages_to_wire",
    "tool_choice_to_wire",
    "tools_to_wire",
]

WIRE_FORMAT = "anthropic_messages"
CALLS_AT = "calls_at"
"""The opaque field of a message with the places of its calls among its blocks, if they are not at the end."""

CONTAINER = "container"
"""The opaque field of a message with calls: the id of the container in which the provider's own tools ran."""

THINKING = "thinking"
"""The opaque field of a message with thinking without a signature. Other vendors of this API want it back."""

READABLE = Readable(texts_as_files=True)
"""What the API takes: https://docs.anthropic.com/en/docs/build-with-claude/files"""
MAX_BREAKPOINTS = 4
INSTRUCTIONS = ("system", "developer")
_NOT_CACHED = ("thinking", "redacted_thinking")  # these blocks cannot have a breakpoint
_ILLEGAL = re.compile(r"[^a-zA-Z0-9_-]")

Wire = dict[str, Any]


def messages_to_wire(messages: Sequence[Message]) -> tuple[list[Wire], list[Wire]]:
    """Convert neutral messages, repaired. Returns the blocks of `system`, and the messages.

    Instructions before the first other message are the system prompt. Later ones become text of the user's
    turn, because most models accept no system message there.
    """
    system: list[Wire] = []
    turns: list[Wire] = []
    ids = _ValidCallIds()
    for message in repaired(with_readable_media(messages, READABLE)):
        role = message["role"]
        if role in INSTRUCTIONS and not turns:
            system += _user_blocks(message.get("content"))
        elif role in INSTRUCTIONS:
            _add(turns, "user", _tagged(_user_blocks(message.get("content"))))
        elif role == "tool":
            _add(turns, "user", [_tool_result(message, ids)])
        elif role == "assistant":
            _add(turns, "assistant", _assistant_blocks(message, ids))
        else:
            _add(turns, role, _user_blocks(message.get("content")))
    if not turns or turns[0]["role"] != "user":
        turns.insert(0, {"role": "user", "content": [_text_block(EMPTY_INPUT)]})
    _strip_last(turns)
    return system, turns


def _add(turns: list[Wire], role: str, blocks: list[Wire]) -> None:
    """Add blocks to the last turn, or as a new turn if its role differs."""
    if turns and turns[-1]["role"] == role:
        turns[-1]["content"] += blocks
    else:
        turns.append({"role": role, "content": list(blocks)})


def _strip_last(turns: list[Wire]) -> None:
    """Remove white space after a reply that the model continues: the API rejects it."""
    last = turns[-1]
    if last["role"] == "assistant" and last["content"][-1].get("type") == "text":
        last["content"][-1] = {**last["content"][-1], "text": last["content"][-1]["text"].rstrip()}


def _text_block(text: str) -> Wire:
    return {"type": "text", "text": text}


def _tagged(blocks: list[Wire]) -> list[Wire]:
    """Instructions inside a user's turn, marked as such."""
    return [_text_block("<system>"), *blocks, _text_block("</system>")]


# --- blocks ----------------------------------------------------------------------------------------------


def _user_blocks(content: Any) -> list[Wire]:
    return [wire for block in content_blocks(content) if (wire := _user_block(block)) is not None]


def _user_block(block: Block) -> Wire | None:
    """A block of a user's message or a tool's result; None if it is empty. Foreign types are unchanged."""
    match block.get("type"):
        case "text" | "refusal":
            text = block.get("text")
            return _with_cache(_text_block(text), block) if has_content([block]) and text else None
        case "image" if "source" not in block:
            return _with_cache({"type": "image", "source": _media_source(block)}, block)
        case "file":
            return _with_cache(_file_block(block), block)
        case "reasoning":
            return None
        case _:
            return dict(block)


def _with_cache(wire: Wire, block: Block) -> Wire:
    return wire | ({"cache_control": block["cache_control"]} if block.get("cache_control") else {})


def _media_source(block: Block) -> Wire:
    if block.get("url"):
        return {"type": "url", "url": block["url"]}
    if block.get("file_id"):
        return {"type": "file", "file_id": block["file_id"]}
    return {"type": "base64", "media_type": block.get("media_type"), "data": block.get("data") or ""}


def _file_block(block: Block) -> Wire:
    media_type = str(block.get("media_type") or "")
    if media_type.startswith("image/"):
        return {"type": "image", "source": _media_source(block)}
    source = _media_source(block)
    if media_type.startswith("text/") and source["type"] == "base64":
        source = {"type": "text", "media_type": "text/plain", "data": file_text(block) or source["data"]}
    return {"type": "document", "source": source} | ({"title": block["name"]} if block.get("name") else {})


def _tool_result(message: Message, ids: _ValidCallIds) -> Wire:
    content = message.get("content")
    blocks = content if isinstance(content, str) else _user_blocks(content)
    wire: Wire = {"type": "tool_result", "tool_use_id": ids.of(message.get("tool_call_id"))}
    if has_content(content) and blocks:
        wire["content"] = blocks
    return wire | ({"is_error": True} if message.get("is_error") else {})


def _assistant_blocks(message: Message, ids: _ValidCallIds) -> list[Wire]:
    own = fields_of_format(message, WIRE_FORMAT)
    blocks = [
        wire for block in content_blocks(message.get("content")) if (wire := _reply_block(block)) is not None
    ]
    thinks = any(block.get("type") in _NOT_CACHED for block in blocks)
    if isinstance(thinking := own.get(THINKING), str) and not thinks:
        blocks.insert(0, {"type": "thinking", "thinking": thinking, "signature": ""})
    calls = [_tool_use(call, ids) for call in message.get("tool_calls") or ()]
    places = own.get(CALLS_AT)
    if isinstance(places, list) and len(places) == len(calls):
        for place, call in zip(places, calls, strict=True):
            blocks.insert(place if isinstance(place, int) else len(blocks), call)
        return blocks
    return blocks + calls


def _reply_block(block: Block) -> Wire | None:
    """A block of an earlier reply, as the API takes it back. None for reasoning of another wire format."""
    match block.get("type"):
        case "text" if block.get("citations"):
            return _text_block(block["text"]) | {"citations": list(block["citations"])}
        case "reasoning" if block.get("format") != WIRE_FORMAT:
            return None
        case "reasoning" if block.get("encrypted"):
            return {"type": "redacted_thinking", "data": block["encrypted"]}
        case "reasoning":
            signature = block.get("signature") or ""
            return {"type": "thinking", "thinking": block.get("text") or "", "signature": signature}
        case _:
            return _user_block(block)


def _tool_use(call: Mapping[str, Any], ids: _ValidCallIds) -> Wire:
    if isinstance(function := call.get("function"), Mapping):  # in OpenAI's format; repaired
        name, arguments = function["name"], loads(function["arguments"])
    else:
        name, arguments = call["name"], dict(call.get("arguments") or {})
    own = fields_of_format(call, WIRE_FORMAT)
    return {**own, "type": "tool_use", "id": ids.of(call.get("id")), "name": name, "input": arguments}


class _ValidCallIds:
    """Replaces ids of tool calls that the API does not accept. Equal ids get equal replacements."""

    def __init__(self) -> None:
        self._valid_ids: dict[str, str] = {}
        self._taken: set[str] = set()

    def of(self, call_id: Any) -> str:
        text = str(call_id)
        if (known := self._valid_ids.get(text)) is not None:
            return known
        base = legal = _ILLEGAL.sub("_", text) or "call"
        number = 1
        while legal in self._taken:
            number += 1
            legal = f"{base}_{number}"
        self._taken.add(legal)
        self._valid_ids[text] = legal
        return legal


# --- tools -----------------------------------------------------------------------------------------------


def tools_to_wire(tools: Sequence[Mapping[str, Any]], messages: Sequence[Wire]) -> list[Wire]:
    """Convert function tools. Other tools are the provider's own and are sent unchanged.

    Without tools, those that the conversation has called are declared, because the API demands it.
    """
    if tools:
        return [_tool_definition(tool) for tool in tools]
    used = dict.fromkeys(
        block["name"]
        for message in messages
        for block in message["content"]
        if block.get("type") == "tool_use"
    )
    return [{"name": name, "input_schema": {"type": "object"}} for name in used]


def _tool_definition(tool: Mapping[str, Any]) -> Wire:
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return dict(tool)
    function = accepted_function(function)
    schema = {"type": "object", **(function.get("parameters") or {})}
    wire: Wire = {"name": function.get("name"), "input_schema": schema}
    if function.get("description"):
        wire["description"] = function["description"]
    return wire | ({"strict": True} if function.get("strict") else {})


def tool_choice_to_wire(choice: Any, *, parallel: bool | None, has_tools: bool) -> Wire | None:
    """Convert OpenAI's `tool_choice`. A choice in Anthropic's format is unchanged."""
    if not has_tools:
        return None
    wire: Wire | None = None
    if isinstance(choice, str):
        wire = {"type": {"required": "any"}.get(choice, choice)}
    elif isinstance(choice, Mapping):
        function = choice.get("function")
        wire = {"type": "tool", "name": function["name"]} if isinstance(function, Mapping) else dict(choice)
    if parallel is False:
        wire = wire or {"type": "auto"}
        if wire["type"] != "none":
            wire = wire | {"disable_parallel_tool_use": True}
    return wire


def container_to_wire(configured: Any, messages: Sequence[Message]) -> Any:
    """The container of a request: the configured one, or that of the calls whose results the request has.

    The provider rejects these results without it, because its own tools may wait for them in there.
    """
    last: Message = next((each for each in reversed(messages) if each.get("role") == "assistant"), {})
    own = fields_of_format(last, WIRE_FORMAT).get(CONTAINER) if last.get("tool_calls") else None
    return in_container(configured, own if isinstance(own, str) else None)


def in_container(configured: Any, name: Any) -> Any:
    """The configured container, if it names one; otherwise its settings with this name."""
    if name is None or isinstance(configured, str):
        return configured
    if isinstance(configured, Mapping):
        return {**configured, "id": configured.get("id") or name}
    return name


# --- the prompt cache ------------------------------------------------------------------------------------


def add_breakpoints(system: list[Wire], tools: list[Wire], messages: list[Wire], mark: Wire) -> None:
    """Mark what the provider's prompt cache keeps: the tools, the instructions, the last two user turns.

    The next request begins with this one, so it is read from the cache up to the last user turn. The turn
    before it is marked too, because the provider searches only 20 blocks before a breakpoint. A pattern that
    sets breakpoints itself gets no further ones.
    """
    if any(_has_breakpoint(block) for block in _all_blocks(system, tools, messages)):
        return
    user_turns = [message["content"] for message in messages if message["role"] == "user"]
    for blocks in (tools, system, *user_turns[-(MAX_BREAKPOINTS - 2) :]):
        for at in reversed(range(len(blocks))):
            if blocks[at].get("type") not in _NOT_CACHED and not blocks[at].get("defer_loading"):
                blocks[at] = {**blocks[at], "cache_control": mark}
                break


def _all_blocks(system: list[Wire], tools: list[Wire], messages: list[Wire]) -> Iterator[Wire]:
    yield from system
    yield from tools
    for message in messages:
        yield from message["content"]


def _has_breakpoint(block: Wire) -> bool:
    content = block.get("content")
    inside = content if isinstance(content, list) else ()
    return block.get("cache_control") is not None or any(
        isinstance(each, Mapping) and each.get("cache_control") is not None for each in inside
    )
