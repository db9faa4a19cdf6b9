"""OpenAI's chat completions on the server's side: the only place that reads and writes their JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from openagents_worker.jsontext import dumps
from openagents_worker.llm.script import words
from openagents_worker.testing.model_server.connection import ReceivedRequest
from openagents_worker.testing.model_server.openai_rules import check_request
from openagents_worker.testing.model_server.wire_format import (
    Event,
    InvalidRequest,
    ModelServerRequest,
    Reply,
    fragments,
    turn_number,
    written_arguments,
)

__all__ = ["OpenAIChatFormat", "openai_error"]


class OpenAIChatFormat:
    """`POST /v1/chat/completions`. Rejects what OpenAI or a stricter server rejects (`openai_rules`)."""

    path = "/v1/chat/completions"

    def read(self, request: ReceivedRequest) -> ModelServerRequest:
        try:
            body = json.loads(request.body)
            check_request(body)
            messages = tuple(body["messages"])
            return ModelServerRequest(
                messages=messages,
                tools=tuple(body.get("tools") or ()),
                model=str(body["model"]),
                stream=bool(body.get("stream")),
                headers=request.headers,
                n=turn_number(messages),
                body=body,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InvalidRequest(f"not a chat completion request: {error!r}") from error

    def headers(self, number: int) -> dict[str, str]:
        return {"x-request-id": f"req_{number}"}

    def whole(self, reply: Reply) -> dict[str, Any]:
        entry = reply.entry
        message: dict[str, Any] = {"role": "assistant", "content": entry.text or None}
        message |= {"refusal": entry.refusal} if entry.refusal else {}
        message |= {"reasoning_content": entry.reasoning} if entry.reasoning else {}
        if calls := _calls(reply):
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "finish_reason": _finish_reason(reply)}
        return _head(reply) | {"object": "chat.completion", "choices": [choice], "usage": _usage(reply)}

    def opening(self, reply: Reply) -> Iterator[Event]:
        yield _choice(reply, {"role": "assistant", "content": ""})

    def pieces(self, reply: Reply) -> Iterator[Event]:
        for word in words(reply.entry.reasoning):
            yield _choice(reply, {"reasoning_content": word})
        for word in words(reply.entry.text):
            yield _choice(reply, {"content": word})
        for word in words(reply.entry.refusal):
            yield _choice(reply, {"refusal": word})
        for index, call in enumerate(_calls(reply)):
            function = call["function"]
            begun = {**call, "index": index, "function": {**function, "arguments": ""}}
            yield _choice(reply, {"tool_calls": [begun]})
            for fragment in fragments(function["arguments"]):
                yield _choice(reply, {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]})

    def closing(self, reply: Reply) -> Iterator[Event]:
        yield _choice(reply, {}, finish_reason=_finish_reason(reply))
        if (reply.request.body.get("stream_options") or {}).get("include_usage"):
            yield _chunk(reply, choices=[], usage=_usage(reply))
        yield Event("[DONE]")

    def error(self, status: int, message: str, number: int) -> dict[str, Any]:
        return openai_error(status, message)

    def failed(self, reply: Reply, message: str) -> dict[str, Any]:
        return openai_error(500, message)

    def failed_event(self, reply: Reply, message: str, number: int) -> Event:
        return Event(dumps(openai_error(500, message)))


def openai_error(status: int, message: str) -> dict[str, Any]:
    """The body of an error in OpenAI's APIs."""
    code = "server_error" if status >= 500 else "invalid_request_error"
    code = "rate_limit_exceeded" if status == 429 else code
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


def _head(reply: Reply) -> dict[str, Any]:
    return {"id": f"chatcmpl-{reply.number}", "created": reply.created, "model": reply.request.model}


def _calls(reply: Reply) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{reply.request.n}_{index}" if call.id is None else call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": written_arguments(call)},
        }
        for index, call in enumerate(reply.entry.tool_calls)
    ]


def _finish_reason(reply: Reply) -> str:
    if (scripted := reply.entry.finish_reason) is not None:
        return str(scripted)
    body = reply.request.body
    if reply.used_up(body.get("max_completion_tokens") or body.get("max_tokens")):
        return "length"
    return "tool_calls" if reply.entry.tool_calls else "stop"


def _usage(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.metadata.get("cached_tokens", 0)},
    }


def _choice(reply: Reply, delta: Mapping[str, Any], finish_reason: str | None = None) -> Event:
    return _chunk(reply, choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])


def _chunk(reply: Reply, **fields: Any) -> Event:
    return Event(dumps(_head(reply) | {"object": "chat.completion.chunk"} | fields))
