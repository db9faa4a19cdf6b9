"""Anthropic's Messages API on the server's side: the only place that reads and writes its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import FinishReason
from openagents_worker.llm.script import ScriptedCall, words
from openagents_worker.testing.model_server.anthropic_rules import (
    Message,
    Text,
    Tool,
    ToolResult,
    ToolUse,
    checked_request,
)
from openagents_worker.testing.model_server.connection import ReceivedRequest
from openagents_worker.testing.model_server.wire_format import (
    Event,
    ModelServerRequest,
    Reply,
    call_id,
    fragments,
    seal,
    turn_number,
    written_arguments,
)

__all__ = ["AnthropicMessagesFormat"]

ERRORS = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
STOP_REASONS = {
    FinishReason.STOP: "end_turn",
    FinishReason.TOOL_CALLS: "tool_use",
    FinishReason.LENGTH: "max_tokens",
    FinishReason.CONTENT_FILTER: "refusal",
    FinishReason.REFUSAL: "refusal",
    FinishReason.ERROR: "error",
    FinishReason.OTHER: "other",
}


class AnthropicMessagesFormat:
    """`POST /v1/messages`."""

    path = "/v1/messages"

    def read(self, request: ReceivedRequest) -> ModelServerRequest:
        parsed, body = checked_request(request)
        messages = tuple(_chat_messages(parsed.system, parsed.messages))
        return ModelServerRequest(
            messages=messages,
            tools=tuple(_chat_tool(tool) for tool in parsed.tools),
            model=parsed.model,
            stream=parsed.stream,
            headers=request.headers,
            n=turn_number(messages),
            body=body,
        )

    def headers(self, number: int) -> dict[str, str]:
        return {"request-id": f"req_{number}"}

    def whole(self, reply: Reply) -> dict[str, Any]:
        thinking = [_thinking(reply.entry.reasoning)] if reply.entry.reasoning else []
        text = [{"type": "text", "text": _shown(reply)}] if _shown(reply) else []
        calls = [_tool_use(reply, index, call, _input(call)) for index, call in _calls(reply)]
        return _message(reply) | {
            "content": [*thinking, *text, *calls],
            **_stop(reply),
            "usage": _usage(reply),
        }

    def opening(self, reply: Reply) -> Iterator[Event]:
        usage = _usage(reply) | {"output_tokens": 1}  # known before there is any content
        yield _event("message_start", message=_message(reply) | {"usage": usage})

    def pieces(self, reply: Reply) -> Iterator[Event]:
        for index, (block, deltas) in enumerate(_streamed_blocks(reply)):
            yield _event("content_block_start", index=index, content_block=block)
            if index == 0:
                yield _event("ping")
            for delta in deltas:
                yield _event("content_block_delta", index=index, delta=delta)
            yield _event("content_block_stop", index=index)

    def closing(self, reply: Reply) -> Iterator[Event]:
        yield _event("message_delta", delta=_stop(reply), usage=_usage(reply))
        yield _event("message_stop")

    def error(self, status: int, message: str, number: int) -> dict[str, Any]:
        kind = ERRORS.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {
            "type": "error",
            "error": {"type": kind, "message": message},
            "request_id": f"req_{number}",
        }

    def failed(self, reply: Reply, message: str) -> dict[str, Any]:
        return self.error(529, message, reply.number)

    def failed_event(self, reply: Reply, message: str, number: int) -> Event:
        return Event(dumps(self.failed(reply, message)), "error")


# --- requests --------------------------------------------------------------------------------------------


def _chat_messages(system: list[Text], messages: list[Message]) -> Iterator[dict[str, Any]]:
    if system:
        yield {"role": "system", "content": _text(system)}
    for message in messages:
        if message.role == "assistant":
            yield _chat_reply(message)
            continue
        yield from (_chat_result(block) for block in message.content if isinstance(block, ToolResult))
        if blocks := [block for block in message.content if not isinstance(block, ToolResult)]:
            yield {"role": message.role, "content": _text(blocks)}


def _chat_reply(message: Message) -> dict[str, Any]:
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": dumps(block.input)},
        }
        for block in message.content
        if isinstance(block, ToolUse)
    ]
    shown = [b for b in message.content if not isinstance(b, ToolUse) and "thinking" not in b.type]
    text = _text(shown)
    reply: dict[str, Any] = {"role": "assistant", "content": text or None}
    return reply | {"tool_calls": calls} if calls else reply


def _chat_result(result: ToolResult) -> dict[str, Any]:
    message = {"role": "tool", "tool_call_id": result.tool_use_id, "content": _text(result.content)}
    return message | {"is_error": True} if result.is_error else message


def _text(blocks: Any) -> Any:
    """The text of text blocks. If there are other blocks too, the list of all blocks."""
    if all(isinstance(block, Text) for block in blocks):
        return "".join(block.text for block in blocks)
    return [block.model_dump(exclude_unset=True) for block in blocks]


def _chat_tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema.model_dump()}
    described = {"description": tool.description} if tool.description is not None else {}
    return {"type": "function", "function": function | described}


# --- replies ---------------------------------------------------------------------------------------------


def _message(reply: Reply) -> dict[str, Any]:
    """A message without content."""
    return {
        "id": f"msg_{reply.number}",
        "type": "message",
        "role": "assistant",
        "model": reply.request.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _streamed_blocks(reply: Reply) -> Iterator[tuple[dict[str, Any], Iterator[dict[str, Any]]]]:
    """Each content block at its start, and the deltas that are added to it."""
    if reasoning := reply.entry.reasoning:
        yield _thinking("") | {"signature": ""}, _thinking_deltas(reasoning)
    if text := _shown(reply):
        yield {"type": "text", "text": ""}, (_text_delta(word) for word in words(text))
    for index, call in _calls(reply):
        parts = ["", *fragments(written_arguments(call))]
        yield _tool_use(reply, index, call, {}), (_input_delta(part) for part in parts)


def _shown(reply: Reply) -> str:
    """The text of a reply. A refusal is text too; only the stop reason marks it."""
    return reply.entry.text or reply.entry.refusal


def _thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": seal(text)}


def _thinking_deltas(text: str) -> Iterator[dict[str, Any]]:
    for word in words(text):
        yield {"type": "thinking_delta", "thinking": word}
    yield {"type": "signature_delta", "signature": seal(text)}


def _text_delta(text: str) -> dict[str, Any]:
    return {"type": "text_delta", "text": text}


def _input_delta(json_text: str) -> dict[str, Any]:
    return {"type": "input_json_delta", "partial_json": json_text}


def _calls(reply: Reply) -> Iterator[tuple[int, ScriptedCall]]:
    return enumerate(reply.entry.tool_calls)


def _tool_use(reply: Reply, index: int, call: ScriptedCall, value: Any) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": call_id(reply, index, call, "toolu_"),
        "name": call.name,
        "input": value,
    }


def _input(call: ScriptedCall) -> Any:
    """The arguments as a JSON object. Text that is not a JSON object is returned unchanged."""
    written = written_arguments(call)
    try:
        value = json.loads(written)
    except ValueError:
        return written
    return value if isinstance(value, dict) else written


def _stop(reply: Reply) -> dict[str, Any]:
    stop: dict[str, Any] = {"stop_reason": _stop_reason(reply), "stop_sequence": None}
    if reply.entry.refusal:
        stop["stop_details"] = {
            "type": "refusal",
            "category": "general_harms",
            "explanation": reply.entry.refusal,
        }
    return stop


def _stop_reason(reply: Reply) -> str:
    if (scripted := reply.entry.finish_reason) is not None:
        return STOP_REASONS[scripted]
    if reply.entry.refusal:
        return "refusal"
    if reply.used_up(reply.request.body["max_tokens"]):
        return "max_tokens"
    return "tool_use" if reply.entry.tool_calls else "end_turn"


def _usage(reply: Reply) -> dict[str, int]:
    """The usage. Here `input_tokens` does not include the tokens that were read from the cache."""
    usage = reply.usage
    cached = int(usage.metadata.get("cached_tokens", 0))
    return {
        "input_tokens": max(0, usage.input_tokens - cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.output_tokens,
    }


def _event(name: str, **fields: Any) -> Event:
    return Event(dumps({"type": name, **fields}), name)
