"""A reply that Anthropic pauses (`pause_turn`) because its own tools take long: it is continued."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openagents_worker.errors import LLMAuthError
from openagents_worker.llm.anthropic_messages import MAX_PAUSES
from openagents_worker.llm.base import CallInfo, FinishReason, LLMResponse, current_call
from tests.unit.llm.raw_server import JSON, STREAM, Sent, answering, sse
from tests.unit.llm.wire import ANTHROPIC, HI, Heard, ask, client_of

SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "tea"}}
FOUND = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [{"title": "Tea"}]}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "s"}
PAUSED = [THOUGHT, {"type": "text", "text": "I look. "}, SEARCH]
REST = [FOUND, {"type": "text", "text": "Tea is a leaf."}]


def message(content: list[Any], stop_reason: str, **usage: Any) -> dict[str, Any]:
    counts = {"input_tokens": 10, "output_tokens": 5, "server_tool_use": {"web_search_requests": 1}, **usage}
    fields = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5"}
    return {**fields, "content": content, "stop_reason": stop_reason, "usage": counts}


def whole(content: list[Any], stop_reason: str) -> Sent:
    return Sent((json.dumps(message(content, stop_reason)).encode(),), JSON)


def streamed(content: list[Any], stop_reason: str) -> Sent:
    """The same as a stream: the arguments of the provider's own tool arrive as pieces of text."""
    events: list[Any] = [{"type": "message_start", "message": message([], "")}]
    for index, block in enumerate(content):
        start, deltas = dict(block), []
        if block["type"] == "text":
            start, deltas = {"type": "text", "text": ""}, [{"type": "text_delta", "text": block["text"]}]
        elif block["type"] == "thinking":
            start = {"type": "thinking", "thinking": "", "signature": ""}
            deltas = [
                {"type": "thinking_delta", "thinking": block["thinking"]},
                {"type": "signature_delta", "signature": block["signature"]},
            ]
        elif block["type"] == "server_tool_use":
            start = {**block, "input": {}}
            deltas = [
                {"type": "input_json_delta", "partial_json": piece} for piece in ('{"query": ', '"tea"}')
            ]
        events.append({"type": "content_block_start", "index": index, "content_block": start})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        events.append({"type": "content_block_stop", "index": index})
    events.append(
        {"type": "message_delta", "delta": {"stop_reason": stop_reason}, "usage": {"output_tokens": 5}}
    )
    return Sent((sse(*events, {"type": "message_stop"}),), STREAM)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_paused_reply_is_continued_by_sending_it_back(is_streamed: bool) -> None:
    """Unchanged, with the arguments of the provider's own tools as an object. One reply comes of it."""
    send, asked = (streamed if is_streamed else whole), []

    def reply(body: dict[str, Any]) -> Sent:
        asked.append(body)
        return send(PAUSED, "pause_turn") if len(asked) == 1 else send(REST, "end_turn")

    heard = Heard()
    async with answering(reply) as url:
        client = client_of(ANTHROPIC, url)
        found: LLMResponse = await ask(client, **({"on_delta": heard} if is_streamed else {}))

    back = {"type": "text", "text": "I look. "}
    sent_back = {"role": "assistant", "content": [THOUGHT, back, SEARCH]}
    assert asked[1]["messages"] == [*asked[0]["messages"], sent_back]
    assert found.output_text == "I look. Tea is a leaf."
    assert [block["type"] for block in found.content] == [
        "reasoning",
        "text",
        "server_tool_use",
        "web_search_tool_result",
        "text",
    ]
    assert found.content[2]["input"] == {"query": "tea"}
    assert found.finish_reason == FinishReason.STOP
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens) == (20, 10)
    assert heard.text == (found.output_text if is_streamed else "")


async def test_the_next_try_continues_the_paused_reply() -> None:
    """What the provider has done already is not paid for twice."""
    asked: list[int] = []

    def reply(body: dict[str, Any]) -> Sent:
        asked.append(len(body["messages"]))
        if len(asked) == 1:
            return whole(PAUSED, "pause_turn")
        return Sent((), JSON, "500 Error") if len(asked) == 2 else whole(REST, "end_turn")

    token = current_call.set(CallInfo("r", "c", "k", 0))
    try:
        async with answering(reply) as url:
            found = await ask(client_of(ANTHROPIC, url))
    finally:
        current_call.reset(token)

    assert asked == [1, 2, 2]
    assert found.output_text == "I look. Tea is a leaf."


async def test_a_reply_is_not_continued_for_ever() -> None:
    """What was said until then counts as cut, so it is no answer unless the pattern accepts it."""
    asked = []

    def reply(body: dict[str, Any]) -> Sent:
        asked.append(body)
        return whole([{"type": "text", "text": "on "}], "pause_turn")

    async with answering(reply) as url:
        found = await ask(client_of(ANTHROPIC, url))

    assert len(asked) == MAX_PAUSES + 1
    assert found.finish_reason == FinishReason.LENGTH
    assert asked[-1]["messages"][-1]["content"] == [{"type": "text", "text": "on"}]


async def test_an_error_in_a_later_part_is_the_error_of_the_call() -> None:
    asked = []

    def reply(body: dict[str, Any]) -> Sent:
        asked.append(body)
        return whole(PAUSED, "pause_turn") if len(asked) == 1 else Sent((), JSON, "401 Unauthorized")

    async with answering(reply) as url:
        with pytest.raises(LLMAuthError):
            await ask(client_of(ANTHROPIC, url), HI)
