"""OpenAI's responses API on the server's side: the only place that reads and writes its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import FinishReason
from openagents_worker.llm.script import ScriptedCall, words
from openagents_worker.testing.model_server.connection import ReceivedRequest
from openagents_worker.testing.model_server.openai_chat import openai_error
from openagents_worker.testing.model_server.openai_responses_rules import check_response_request, items_of
from openagents_worker.testing.model_server.wire_format import (
    Event,
    InvalidRequest,
    ModelServerRequest,
    Reply,
    call_id,
    fragments,
    seal,
    turn_number,
    written_arguments,
)

__all__ = ["OpenAIResponsesFormat"]

ENCRYPTED = "reasoning.encrypted_content"
"""The value of `include` with which the reasoning can be sent back to a server that stores nothing."""
OPENING_EVENTS = 2
INCOMPLETE = {
    FinishReason.LENGTH: "max_output_tokens",
    FinishReason.CONTENT_FILTER: "content_filter",
}


class OpenAIResponsesFormat:
    """`POST /v1/responses`. Rejects what OpenAI rejects (`openai_responses_rules`)."""

    path = "/v1/responses"

    def read(self, request: ReceivedRequest) -> ModelServerRequest:
        try:
            body = json.loads(request.body)
            check_response_request(body)
            messages = tuple(_chat_messages(body))
            return ModelServerRequest(
                messages=messages,
                tools=tuple(map(_chat_tool, body.get("tools") or ())),
                model=body["model"],
                stream=bool(body.get("stream")),
                headers=request.headers,
                n=turn_number(messages),
                body=body,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InvalidRequest(f"not a request for a response: {error!r}") from error

    def headers(self, number: int) -> dict[str, str]:
        return {"x-request-id": f"req_{number}"}

    def whole(self, reply: Reply) -> dict[str, Any]:
        return response(reply, _ending(reply)[0])

    def opening(self, reply: Reply) -> Iterator[Event]:
        yield from self.events(reply)[:OPENING_EVENTS]

    def pieces(self, reply: Reply) -> Iterator[Event]:
        yield from self.events(reply)[OPENING_EVENTS:-1]

    def closing(self, reply: Reply) -> Iterator[Event]:
        yield self.events(reply)[-1]

    def error(self, status: int, message: str, number: int) -> dict[str, Any]:
        return openai_error(status, message)

    def failed(self, reply: Reply, message: str) -> dict[str, Any]:
        return response(reply, "failed", message)

    def failed_event(self, reply: Reply, message: str, number: int) -> Event:
        return _event("response.failed", number, response=self.failed(reply, message))

    def events(self, reply: Reply) -> list[Event]:
        """All events of the reply. The number in an event is its place in this list."""
        numbers = count()
        begun = response(reply, "in_progress")
        status, last = _ending(reply)
        return [
            _event("response.created", next(numbers), response=begun),
            _event("response.in_progress", next(numbers), response=begun),
            *(_event(name, next(numbers), **fields) for name, fields in _item_events(reply)),
            _event(last, next(numbers), response=response(reply, status)),
        ]


# --- requests --------------------------------------------------------------------------------------------


def _chat_messages(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The conversation as chat messages. Consecutive items of the assistant are one message."""
    if body.get("instructions"):
        yield {"role": "system", "content": body["instructions"]}
    reply: list[Mapping[str, Any]] = []
    for item in items_of(body):
        if item["type"] in ("reasoning", "function_call") or item.get("role") == "assistant":
            reply.append(item)
            continue
        if reply:
            yield _chat_reply(reply)
            reply = []
        if item["type"] == "function_call_output":
            yield {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])}
        else:
            yield {"role": item["role"], "content": _text(item["content"])}
    if reply:
        yield _chat_reply(reply)


def _chat_reply(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    text = "".join(str(_text(item["content"])) for item in items if item["type"] == "message")
    calls = [
        {
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": item["arguments"]},
        }
        for item in items
        if item["type"] == "function_call"
    ]
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    return message | {"tool_calls": calls} if calls else message


def _text(content: Any) -> Any:
    """The text of text parts. If there are other parts too, the list of all parts."""
    if isinstance(content, str):
        return content
    if all(part["type"] in ("input_text", "output_text", "refusal") for part in content):
        return "".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in content)
    return content


def _chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool["type"] != "function":
        return dict(tool)  # the provider's own
    function = {"name": tool["name"], "parameters": tool["parameters"]}
    described = {"description": tool["description"]} if tool.get("description") is not None else {}
    return {"type": "function", "function": function | described}


# --- replies ---------------------------------------------------------------------------------------------


def response_id(reply: Reply) -> str:
    return f"resp_{reply.number}"


def response(reply: Reply, status: str, problem: str | None = None) -> dict[str, Any]:
    """The response in a status. It has output and usage once it has ended well."""
    body = reply.request.body
    complete = status in ("completed", "incomplete")
    background = bool(body.get("background"))
    return {
        "id": response_id(reply),
        "object": "response",
        "created_at": reply.created,
        "status": status,
        "background": background,
        "error": {"code": "server_error", "message": problem} if problem is not None else None,
        "incomplete_details": {"reason": _why_incomplete(reply)} if status == "incomplete" else None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": reply.request.model,
        "output": _output(reply) if complete else [],
        "parallel_tool_calls": body.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": body.get("store", True),
        "temperature": body.get("temperature", 1.0),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": list(body.get("tools") or ()),
        "top_p": body.get("top_p", 1.0),
        "truncation": "disabled",
        "usage": _usage(reply) if complete else None,
        "user": body.get("user"),
        "metadata": body.get("metadata") or {},
    }


def _ending(reply: Reply) -> tuple[str, str]:
    """The status of the whole reply, and the name of the last event of its stream."""
    is_cut = reply.used_up(reply.request.body.get("max_output_tokens"))
    if is_cut or reply.entry.finish_reason in INCOMPLETE:
        return "incomplete", "response.incomplete"
    return "completed", "response.completed"


def _why_incomplete(reply: Reply) -> str:
    scripted = reply.entry.finish_reason
    return "max_output_tokens" if scripted is None else INCOMPLETE.get(scripted, "max_output_tokens")


def _output(reply: Reply) -> list[dict[str, Any]]:
    status = _ending(reply)[0]
    items = []
    if reply.entry.reasoning:
        items.append(_reasoning(reply))
    if part := _part(reply):
        items.append(_message(reply, status, [part]))
    items += [
        _call(reply, index, call, status, written_arguments(call))
        for index, call in enumerate(reply.entry.tool_calls)
    ]
    return items


def _reasoning(reply: Reply) -> dict[str, Any]:
    text = reply.entry.reasoning
    item = {
        "id": f"rs_{reply.number}",
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": text}],
    }
    wanted = ENCRYPTED in (reply.request.body.get("include") or ())
    return item | ({"encrypted_content": seal(text)} if wanted else {})


def _part(reply: Reply) -> dict[str, Any] | None:
    """The content of the reply's message."""
    if reply.entry.refusal:
        return {"type": "refusal", "refusal": reply.entry.refusal}
    if reply.entry.text:
        return {"type": "output_text", "text": reply.entry.text, "annotations": [], "logprobs": []}
    return None


def _message(reply: Reply, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"msg_{reply.number}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _call(reply: Reply, index: int, call: ScriptedCall, status: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"fc_{reply.number}_{index}",
        "type": "function_call",
        "status": status,
        "call_id": call_id(reply, index, call, "call_"),
        "name": call.name,
        "arguments": arguments,
    }


def _usage(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {
            "cached_tokens": int(usage.metadata.get("cached_tokens", 0)),
            "cache_write_tokens": 0,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }


# --- streams ---------------------------------------------------------------------------------------------


def _item_events(reply: Reply) -> Iterator[tuple[str, dict[str, Any]]]:
    """The events between the beginning and the end: each item is added, grows, and is done."""
    status = _ending(reply)[0]
    for index, item in enumerate(_output(reply)):
        at = {"item_id": item["id"], "output_index": index}
        if item["type"] == "reasoning":
            begun, grow = item | {"summary": []}, _reasoning_events(item["summary"][0], at)
        elif item["type"] == "message":
            begun, grow = item | {"content": []}, _message_events(item["content"][0], at)
        else:
            begun, grow = item | {"arguments": ""}, _call_events(item, at)
        if "status" in begun:
            begun |= {"status": "in_progress"}
        yield "response.output_item.added", {"output_index": index, "item": begun}
        yield from grow
        done = item | {"status": status} if "status" in item else item
        yield "response.output_item.done", {"output_index": index, "item": done}


def _reasoning_events(part: Mapping[str, Any], at: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    place = {**at, "summary_index": 0}
    yield "response.reasoning_summary_part.added", {**place, "part": {**part, "text": ""}}
    for word in words(part["text"]):
        yield "response.reasoning_summary_text.delta", {**place, "delta": word}
    yield "response.reasoning_summary_text.done", {**place, "text": part["text"]}
    yield "response.reasoning_summary_part.done", {**place, "part": part}


def _message_events(part: Mapping[str, Any], at: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    place = {**at, "content_index": 0}
    field = "refusal" if part["type"] == "refusal" else "text"
    event = f"response.{part['type']}"
    more: dict[str, Any] = {"logprobs": []} if field == "text" else {}
    yield "response.content_part.added", {**place, "part": {**part, field: ""}}
    for word in words(part[field]):
        yield f"{event}.delta", {**place, "delta": word, **more}
    yield f"{event}.done", {**place, field: part[field], **more}
    yield "response.content_part.done", {**place, "part": part}


def _call_events(call: Mapping[str, Any], at: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for fragment in fragments(call["arguments"]):
        yield "response.function_call_arguments.delta", {**at, "delta": fragment}
    done = {**at, "arguments": call["arguments"], "name": call["name"]}
    yield "response.function_call_arguments.done", done


def _event(name: str, number: int, /, **fields: Any) -> Event:
    return Event(dumps({"type": name, "sequence_number": number, **fields}), name)
