"""A reply that is cut at its token limit inside a tool call: the call has no arguments that can be used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openagents_worker.llm.base import FinishReason, LLMResponse
from tests.unit.llm.raw_server import JSON, STREAM, Sent, answering, delta, sse, whole
from tests.unit.llm.wire import ANTHROPIC, CHAT, RESPONSES, TOOLS, Format, Heard, ask, client_of

FIRST = {"a": 1, "b": 2}


def of_anthropic(last: Any, stop_reason: str) -> dict[str, Any]:
    calls = [
        {"type": "tool_use", "id": f"toolu_{index}", "name": "add", "input": arguments}
        for index, arguments in enumerate((FIRST, last))
    ]
    content = [{"type": "text", "text": "I add."}, *calls]
    return {"type": "message", "id": "msg_1", "content": content, "stop_reason": stop_reason}


def streamed_by_anthropic(last: str, stop_reason: str) -> Sent:
    events: list[Any] = [{"type": "message_start", "message": {**of_anthropic({}, ""), "content": []}}]
    for index, arguments in enumerate((json.dumps(FIRST), last)):
        block = {"type": "tool_use", "id": f"toolu_{index}", "name": "add", "input": {}}
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        if arguments:
            piece = {"type": "input_json_delta", "partial_json": arguments}
            events.append({"type": "content_block_delta", "index": index, "delta": piece})
        events.append({"type": "content_block_stop", "index": index})
    events.append({"type": "message_delta", "delta": {"stop_reason": stop_reason}, "usage": {}})
    return Sent((sse(*events),), STREAM)


def of_chat(last: str, finish_reason: str) -> dict[str, Any]:
    calls = [
        {"id": f"call_{index}", "type": "function", "function": {"name": "add", "arguments": arguments}}
        for index, arguments in enumerate((json.dumps(FIRST), last))
    ]
    return whole(finish_reason, content=None, tool_calls=calls)


def streamed_by_chat(last: str, finish_reason: str) -> Sent:
    calls = of_chat(last, finish_reason)["choices"][0]["message"]["tool_calls"]
    chunks = [delta(tool_calls=[{**call, "index": index}]) for index, call in enumerate(calls)]
    return Sent((sse(*chunks, delta(finish_reason), "[DONE]"),), STREAM)


def of_responses(last: str, why: str | None) -> dict[str, Any]:
    output = [
        {"type": "function_call", "call_id": f"call_{index}", "name": "add", "arguments": arguments}
        for index, arguments in enumerate((json.dumps(FIRST), last))
    ]
    status = {"status": "completed"} if why is None else {"status": "incomplete"}
    details = {"incomplete_details": None if why is None else {"reason": why}}
    return {"object": "response", "id": "resp_1", **status, **details, "output": output}


def body(reply: dict[str, Any]) -> Sent:
    return Sent((json.dumps(reply).encode(),), JSON)


async def answered(wire: Format, sent: Sent) -> LLMResponse:
    heard = {"on_delta": Heard()} if sent.head == STREAM else {}
    async with answering(lambda _: sent) as url:
        reply: LLMResponse = await ask(client_of(wire, url), tools=TOOLS, **heard)
    return reply


@pytest.mark.parametrize(
    ("wire", "sent"),
    [
        (ANTHROPIC, body(of_anthropic({}, "max_tokens"))),
        (ANTHROPIC, body(of_anthropic({"a": 1}, "max_tokens"))),
        (ANTHROPIC, body(of_anthropic({"a": 1}, "model_context_window_exceeded"))),
        (ANTHROPIC, streamed_by_anthropic("", "max_tokens")),
        (ANTHROPIC, streamed_by_anthropic('{"a": 1', "max_tokens")),
        (CHAT, body(of_chat("", "length"))),
        (CHAT, body(of_chat('{"a": 1', "length"))),
        (CHAT, streamed_by_chat("", "length")),
        (CHAT, streamed_by_chat('{"a": 1', "length")),
        (RESPONSES, body(of_responses("", "max_output_tokens"))),
        (RESPONSES, body(of_responses('{"a": 1', "max_output_tokens"))),
    ],
)
async def test_the_call_in_which_a_reply_was_cut_cannot_be_executed(wire: Format, sent: Sent) -> None:
    """Otherwise a tool would run without the arguments that the model has not written. Anthropic sends those
    that it has: https://docs.anthropic.com/en/docs/build-with-claude/handling-stop-reasons"""
    reply = await answered(wire, sent)

    first, last = reply.tool_calls
    assert reply.finish_reason is FinishReason.LENGTH
    assert (first.arguments, first.parse_error) == (FIRST, None)
    assert (last.name, last.arguments) == ("add", {})
    assert last.parse_error


@pytest.mark.parametrize(
    ("wire", "sent"),
    [
        (ANTHROPIC, body(of_anthropic({}, "tool_use"))),
        (ANTHROPIC, streamed_by_anthropic("", "tool_use")),
        (CHAT, body(of_chat("", "tool_calls"))),
        (CHAT, body(of_chat("{}", "length"))),
        (CHAT, streamed_by_chat("", "tool_calls")),
        (RESPONSES, body(of_responses("", None))),
        (RESPONSES, body(of_responses("{}", "max_output_tokens"))),
    ],
)
async def test_a_whole_call_without_arguments_is_executed(wire: Format, sent: Sent) -> None:
    reply = await answered(wire, sent)

    assert [call.parse_error for call in reply.tool_calls] == [None, None]


async def test_the_calls_before_the_end_of_a_cut_reply_are_whole() -> None:
    """The reply was cut in its text."""
    message = of_anthropic(FIRST, "max_tokens")
    message["content"].append({"type": "text", "text": "And th"})

    reply = await answered(ANTHROPIC, body(message))

    assert [call.parse_error for call in reply.tool_calls] == [None, None]
