"""Items of OpenAI's responses API: the only place that converts messages, tools and replies to and from them.

The reference is https://platform.openai.com/docs/api-reference/responses. The conversation is ours: nothing
refers to what the provider has stored. Reasoning is sent back encrypted, before the item it belongs to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from openagents_worker.errors import LLMError, LLMResponseError
from openagents_worker.jsontext import dumps, replaced, whole_text
from openagents_worker.llm.base import (
    FinishReason,
    LLMResponse,
    LLMToolCall,
    Message,
)
from openagents_worker.llm.conversation import EMPTY_INPUT, cut_calls, repaired, tool_call
from openagents_worker.llm.failures import failure
from openagents_worker.llm.media import ENDINGS, Readable, with_readable_media
from openagents_worker.llm.messages import (
    Block,
    content_blocks,
    content_text,
    data_url,
    fields_of_format,
    has_content,
    is_blank_text,
)
from openagents_worker.llm.root_schemas import accepted_function
from openagents_worker.llm.usage import tools_of_response, usage_from_wire

__all__ = [
    "WIRE_FORMAT",
    "items_to_wire",
    "response_from_wire",
    "tool_choice_to_wire",
    "tool_to_wire",
]

WIRE_FORMAT = "responses"
CALLS_AT = "calls_at"
"""The opaque field of a message with the places of its calls among its blocks, if they are not at the end."""
PHASES = "phases"
"""The opaque field of a message with the `phase` of each of its texts: a comment, or the final answer."""

READABLE = Readable(frozenset(ENDINGS))
"""What the API takes: https://platform.openai.com/docs/guides/file-inputs"""
_OWN_CALL_FIELDS = ("async", "caller", "namespace")
"""Fields of a call that the provider wants back: it rejects a call of a namespace without it."""

Wire = dict[str, Any]


# --- requests --------------------------------------------------------------------------------------------


def items_to_wire(messages: Sequence[Message]) -> list[Wire]:
    """Convert neutral messages, repaired, to the items of `input`. The API rejects an empty input."""
    callers: dict[str, Any] = {}
    messages = with_readable_media(messages, READABLE)
    items = [item for message in repaired(messages) for item in _items_of_message(message, callers)]
    return items or [{"role": "user", "content": EMPTY_INPUT}]


def _items_of_message(message: Message, callers: dict[str, Any]) -> list[Wire]:
    """The items of a message. `callers`: the programs of the provider that wait for results, by call id."""
    role, content = message["role"], message.get("content")
    if role == "tool":
        output = _input_content(content) if has_content(content) else ""
        call_id = str(message.get("tool_call_id"))
        item = {"type": "function_call_output", "call_id": call_id, "output": output}
        return [item | ({"caller": callers[call_id]} if call_id in callers else {})]
    if role == "assistant":
        items = _assistant_items(message)
        callers |= {
            item["call_id"]: item["caller"] for item in items if "caller" in item and "call_id" in item
        }
        return items
    return [{"role": role, "content": _input_content(content)}]


def _input_content(content: Any) -> Any:
    """The content of a user's message or a tool's result: a text, or parts."""
    if isinstance(content, str):
        return content
    blocks = [block for block in content_blocks(content) if block.get("type") != "reasoning"]
    if len(blocks) == 1 and blocks[0].get("type") == "text" and blocks[0].get("text"):
        return blocks[0]["text"]
    return [_part(block) for block in blocks]


def _part(block: Block) -> Wire:
    """The part for a block. A block that is not neutral is sent unchanged."""
    match block.get("type"):
        case "text" | "refusal":
            return {"type": "input_text", "text": block.get("text") or ""}
        case "image" if "image_url" not in block:
            image = {"file_id": block.get("file_id")} if block.get("file_id") else {"image_url": _url(block)}
            return {"type": "input_image", "detail": block.get("detail") or "auto", **image}
        case "file" if "file" not in block:
            source = (
                {"file_id": block["file_id"]}
                if block.get("file_id")
                else {"file_url": block["url"]}
                if block.get("url")
                else {"file_data": data_url(block)}
            )
            ending = ENDINGS.get(str(block.get("media_type")), "txt")
            name = block.get("name") or (f"file.{ending}" if "file_data" in source else None)
            return {"type": "input_file", **source} | ({"filename": name} if name else {})
        case _:
            return dict(block)


def _url(block: Block) -> str:
    return str(block.get("url") or data_url(block))


def _assistant_items(message: Message) -> list[Wire]:
    """The items of a reply, in the order in which the model wrote them."""
    own = fields_of_format(message, WIRE_FORMAT)
    known = own.get(PHASES)
    phases: list[Any] = known if isinstance(known, list) else []
    items: list[Wire | None] = []
    for place, block in enumerate(content_blocks(message.get("content"))):
        items.append(_said(block, phases[place] if place < len(phases) else None))
    calls = [_call(call) for call in message.get("tool_calls") or ()]
    places = own.get(CALLS_AT)
    if isinstance(places, list) and len(places) == len(calls):
        for at, call in zip(places, calls, strict=True):
            items.insert(at if isinstance(at, int) else len(items), call)
    else:
        items += calls
    sent = [item for item in items if item is not None]
    while sent and sent[-1].get("type") == "reasoning":  # the API demands the item that it belongs to
        sent.pop()
    return sent


def _said(block: Block, phase: Any) -> Wire | None:
    """The item for a block of a reply. The reasoning of other wire formats is left out."""
    match block.get("type"):
        case "reasoning":
            return _reasoning(block)
        case "refusal":
            return _message({"type": "refusal", "refusal": block.get("text") or ""}, phase)
        case "text" if block.get("citations"):
            annotations = list(block["citations"])
            text = {"type": "output_text", "text": block["text"], "annotations": annotations}
            return _message(text, phase)
        case "text":
            if not has_content([block]):
                return None
            item = {"role": "assistant", "content": block["text"]}
            return item | ({"phase": phase} if isinstance(phase, str) else {})
        case "image" | "file":
            return _message({"type": "output_text", "text": _url(block), "annotations": []}, phase)
        case _:
            return dict(block)


def _message(part: Wire, phase: Any) -> Wire:
    """A message of the assistant with a part that is more than text. The API demands an id."""
    digest = hashlib.sha256(dumps(part).encode("utf-8", "replace")).hexdigest()[:32]
    item = {
        "type": "message",
        "id": f"msg_{digest}",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }
    return item | ({"phase": phase} if isinstance(phase, str) else {})


def _reasoning(block: Block) -> Wire | None:
    if block.get("format") != WIRE_FORMAT or not (block.get("encrypted") or block.get("content")):
        return None
    text = block.get("text")
    summary = block.get("summary") or ([text] if text and not block.get("content") else [])
    item: Wire = {
        "type": "reasoning",
        "id": block.get("id") or "rs_0",
        "summary": [{"type": "summary_text", "text": each} for each in summary],
    }
    if block.get("content"):
        item["content"] = [{"type": "reasoning_text", "text": each} for each in block["content"]]
    return item | ({"encrypted_content": block["encrypted"]} if block.get("encrypted") else {})


def _call(call: Mapping[str, Any]) -> Wire:
    if isinstance(function := call.get("function"), Mapping):  # in the format of chat completions; repaired
        name, arguments = function["name"], function["arguments"]
    else:
        name, arguments = call["name"], dumps(call.get("arguments") or {})
    own = fields_of_format(call, WIRE_FORMAT)
    return {
        **own,
        "type": "function_call",
        "call_id": str(call.get("id")),
        "name": name,
        "arguments": arguments,
    }


def tool_to_wire(tool: Mapping[str, Any]) -> Wire:
    """Convert a function tool. Other tools are the provider's own and are sent unchanged."""
    function = tool.get("function")
    if not isinstance(function, Mapping):
        return dict(tool)
    function = accepted_function(function)
    described = {"description": function["description"]} if function.get("description") else {}
    return {
        "type": "function",
        "name": function.get("name"),
        **described,
        "parameters": {"type": "object", **(function.get("parameters") or {})},
        "strict": bool(function.get("strict")),
    }


def tool_choice_to_wire(choice: Any) -> Any:
    """Convert `tool_choice` of chat completions. Other values are unchanged."""
    function = choice.get("function") if isinstance(choice, Mapping) else None
    return {"type": "function", "name": function.get("name")} if isinstance(function, Mapping) else choice


# --- replies ---------------------------------------------------------------------------------------------


def response_from_wire(body: Any, *, provider: str) -> LLMResponse:
    """Parse a complete response. Raises `LLMError` if it failed, `LLMResponseError` if it is not one."""
    try:
        error = _failure(body, provider)
        reply = None if error is not None else _reply(body, provider)
    except Exception as problem:  # a value of the wrong type can raise anything, for example OverflowError
        text = f"{provider}: the reply is not a response ({problem!r})"
        raise LLMResponseError(text) from problem
    if error is not None:
        raise error
    assert reply is not None
    return reply


def _failure(body: Mapping[str, Any], provider: str) -> LLMError | None:
    """The error of a response that failed or was cancelled; None if it has ended well."""
    status = body.get("status")
    if status == "cancelled":
        return LLMResponseError(f"{provider}: the response was cancelled at the provider")
    if status != "failed":
        return None
    error = body.get("error") or {}
    text = f"the response failed: {error.get('message') or 'no message'}"
    failed = failure(
        {"error": {"code": error.get("code"), "message": text}},
        status=None,
        headers={},
        provider=provider,
        key_origin="llm.api_key_env or llm.api_key_file",
        secrets=(),  # the client masks them
    )
    failed.usage = usage_from_wire(body.get("usage"), service_tier=body.get("service_tier"))
    return failed


def _reply(body: Mapping[str, Any], provider: str) -> LLMResponse:
    blocks: list[Wire] = []
    calls: list[LLMToolCall] = []
    places: list[int] = []
    phases: list[str | None] = []
    for index, item in enumerate(body["output"]):
        if item["type"] == "function_call":
            places.append(len(phases) + len(calls))
            calls.append(_call_from_wire(item, f"{_text_or_none(body.get('id')) or 'call'}_{index}"))
            continue
        found = _blocks(item)
        blocks += found
        phases += [_text_or_none(item.get("phase")) for block in found if not is_blank_text(block)]
    if calls and body.get("status") == "incomplete" and _is_begun_call(body["output"][-1]):
        calls = cut_calls(calls)
    at_end = places == list(range(len(phases), len(phases) + len(calls)))
    is_kept = any(map(_is_more_than_text, blocks))  # otherwise the message has one text
    phases = phases if is_kept else phases[-1:]
    own: dict[str, Any] = {} if at_end or not is_kept else {CALLS_AT: places}
    own |= {PHASES: phases} if any(phases) else {}
    refused = any(block["type"] == "refusal" for block in blocks)
    why = (body.get("incomplete_details") or {}).get("reason")
    return LLMResponse(
        output_text=content_text(blocks),
        tool_calls=tuple(calls),
        usage=usage_from_wire(
            body.get("usage"), service_tier=body.get("service_tier"), used_tools=tools_of_response(body)
        ),
        stop_reason=_text_or_none(why) or _text_or_none(body.get("status")),
        model=_text_or_none(body.get("model")),
        provider=provider,
        response_id=_text_or_none(body.get("id")),
        content=tuple(blocks) if is_kept else (),
        finish_reason=_finish_reason(body, why, has_calls=bool(calls), refused=refused),
        provider_fields={WIRE_FORMAT: own} if own else {},
    )


def _is_begun_call(item: Mapping[str, Any]) -> bool:
    """Whether it is a call without any text of its arguments."""
    return item["type"] == "function_call" and not item.get("arguments")


def _finish_reason(
    body: Mapping[str, Any], why: Any, *, has_calls: bool, refused: bool
) -> FinishReason | None:
    if body.get("status") == "incomplete":
        return FinishReason.CONTENT_FILTER if why == "content_filter" else FinishReason.LENGTH
    if refused:
        return FinishReason.REFUSAL
    if has_calls:
        return FinishReason.TOOL_CALLS
    return FinishReason.STOP if body.get("status") in ("completed", None) else FinishReason.OTHER


def _text_or_none(value: Any) -> str | None:
    return whole_text(value) if isinstance(value, str) else None


def _text(value: Any) -> str:
    return whole_text(value) if isinstance(value, str) else ""


def _blocks(item: Mapping[str, Any]) -> list[Wire]:
    """The neutral blocks of an item. Items of the provider's own tools are unchanged."""
    if item["type"] == "reasoning":
        return [_reasoning_block(item)]
    if item["type"] != "message":
        return [replaced(dict(item))]
    return [_message_block(part) for part in item["content"]]


def _message_block(part: Mapping[str, Any]) -> Wire:
    if part["type"] == "refusal":
        return {"type": "refusal", "text": _text(part.get("refusal"))}
    citations = replaced(part.get("annotations") or [])
    text = {"type": "text", "text": _text(part.get("text"))}
    return text | ({"citations": citations} if citations else {})


def _reasoning_block(item: Mapping[str, Any]) -> Wire:
    summary = [_text(part.get("text")) for part in item.get("summary") or ()]
    content = [_text(part.get("text")) for part in item.get("content") or ()]
    block: Wire = {
        "type": "reasoning",
        "text": "\n\n".join(summary or content),
        "id": _text(item.get("id")),
        "encrypted": _text(item.get("encrypted_content")),
        "format": WIRE_FORMAT,
    }
    if len(summary) > 1 or (summary and content):
        block["summary"] = summary
    return block | ({"content": content} if content else {})


def _is_more_than_text(block: Block) -> bool:
    return block.get("type") != "text" or "citations" in block


def _call_from_wire(item: Mapping[str, Any], default_id: str) -> LLMToolCall:
    call_id = _text_or_none(item.get("call_id")) or _text_or_none(item.get("id"))
    usable = call_id if call_id and call_id.strip() else default_id
    call = tool_call(usable, item.get("name"), item.get("arguments"))
    own = {name: replaced(item[name]) for name in _OWN_CALL_FIELDS if _is_stored(item.get(name))}
    return replace(call, provider_fields={WIRE_FORMAT: own}) if own else call


def _is_stored(value: Any) -> bool:
    return value not in (None, False, {"type": "direct"})  # called by the model itself: the default
