"""A reply that Anthropic pauses (`pause_turn`) because its own tools take long: it is continued."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from openagents_worker.errors import LLMAuthError, LLMResponseError
from openagents_worker.llm.anthropic_messages import MAX_PAUSES
from openagents_worker.llm.base import (
    CallInfo,
    Delta,
    DeltaKind,
    FinishReason,
    LLMResponse,
    ModelRequest,
    current_call,
)
from openagents_worker.llm.conversation import assistant_message
from openagents_worker.llm.limits import RequestLimit
from tests.unit.llm.raw_server import JSON, STREAM, Sent, answering, sse
from tests.unit.llm.wire import ANTHROPIC, HI, TOOLS, Heard, ask, client_of

SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "tea"}}
FOUND = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [{"title": "Tea"}]}
THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "s"}
PAUSED = [THOUGHT, {"type": "text", "text": "I look. "}, SEARCH]
REST = [FOUND, {"type": "text", "text": "Tea is a leaf."}]


def message(content: list[Any], stop_reason: str, **usage: Any) -> dict[str, Any]:
    counts = {"input_tokens": 10, "output_tokens": 5, "server_tool_use": {"web_search_requests": 1}, **usage}
    fields = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5"}
    return {**fields, "content": content, "stop_reason": stop_reason, "usage": counts}


def whole(content: list[Any], stop_reason: str, head: str = JSON) -> Sent:
    return Sent((json.dumps(message(content, stop_reason)).encode(),), head)


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


async def test_the_arguments_of_the_providers_own_tools_are_not_those_of_a_call() -> None:
    """A watcher gets the arguments of the calls of the reply, which are numbered from 0."""
    call = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {}}
    events: list[Any] = [{"type": "message_start", "message": message([], "")}]
    for index, block in enumerate([{**SEARCH, "input": {}}, call]):
        delta = {"type": "input_json_delta", "partial_json": json.dumps({"n": index})}
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        events.append({"type": "content_block_delta", "index": index, "delta": delta})
    stop = {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 5}}
    heard: list[Delta] = []

    async def listen(piece: Delta) -> None:
        heard.append(piece)

    async with answering(lambda _: Sent((sse(*events, stop),), STREAM)) as url:
        client = client_of(ANTHROPIC, url)
        try:
            reply = await client.respond(ModelRequest(HI, tools=TOOLS, on_piece=listen))
        finally:
            await client.aclose()

    assert heard == [Delta(DeltaKind.ARGUMENTS, '{"n": 1}', 0, "add")]
    assert [call.arguments for call in reply.tool_calls] == [{"n": 1}]
    assert reply.content[0]["input"] == {"n": 0}


CONTAINER = {"id": "container_1", "expires_at": "2026-12-01T00:00:00Z"}


def in_container(sent: dict[str, Any], is_streamed: bool) -> Sent:
    """A reply whose tools ran in a container. A stream names it with the stop reason."""
    if not is_streamed:
        return Sent((json.dumps({**sent, "container": CONTAINER}).encode(),), JSON)
    stop = {"stop_reason": sent["stop_reason"], "container": CONTAINER}
    events: list[Any] = [{"type": "message_start", "message": {**sent, "content": [], "stop_reason": None}}]
    for index, block in enumerate(sent["content"]):
        events.append({"type": "content_block_start", "index": index, "content_block": block})
    return Sent(
        (sse(*events, {"type": "message_delta", "delta": stop, "usage": {"output_tokens": 5}}),), STREAM
    )


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        (None, "container_1"),
        ({"skills": [{"skill_id": "pdf"}]}, {"skills": [{"skill_id": "pdf"}], "id": "container_1"}),
        ("ours", "ours"),
        ({"id": "ours"}, {"id": "ours"}),
    ],
)
async def test_a_paused_reply_is_continued_in_its_container(
    is_streamed: bool, configured: Any, expected: Any
) -> None:
    """In another one, what its tools have stored is not there."""
    asked: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> Sent:
        asked.append(body)
        return (
            in_container(message(PAUSED, "pause_turn"), is_streamed)
            if len(asked) == 1
            else in_container(message(REST, "end_turn"), is_streamed)
        )

    async with answering(reply) as url:
        client = client_of(ANTHROPIC, url, container=configured)
        await ask(client, **({"on_delta": Heard()} if is_streamed else {}))

    assert asked[0].get("container") == configured
    assert asked[1]["container"] == expected


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_the_results_of_calls_are_sent_to_the_container_that_waits_for_them(is_streamed: bool) -> None:
    """The API rejects them otherwise. A later turn gets a container of its own: this one may be gone."""
    call = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {}}
    asked: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> Sent:
        asked.append(body)
        if len(asked) == 1:
            return in_container(message([SEARCH, call], "tool_use"), is_streamed)
        return in_container(message([{"type": "text", "text": "3"}], "end_turn"), is_streamed)

    listener: dict[str, Any] = {"on_delta": Heard()} if is_streamed else {}
    async with answering(reply) as url:
        first = await ask(client_of(ANTHROPIC, url), tools=TOOLS, **listener)
        said = assistant_message(LLMResponse.from_wire(first.to_wire()), first.tool_calls)
        result = {"role": "tool", "tool_call_id": "toolu_1", "name": "add", "content": "3"}
        second = await ask(client_of(ANTHROPIC, url), [*HI, said, result], tools=TOOLS, **listener)
        answer = assistant_message(second)
        await ask(client_of(ANTHROPIC, url), [*HI, said, result, answer, *HI], tools=TOOLS, **listener)

    assert [body.get("container") for body in asked] == [None, "container_1", None]


async def test_a_reply_that_pauses_after_a_compaction_is_continued_with_it() -> None:
    """Its summary arrives in a piece of its own; without it, the model would not know the conversation."""
    asked: list[dict[str, Any]] = []
    compaction = {"type": "compaction", "content": None, "signature": "s"}
    piece = {"type": "compaction_delta", "content": "They talked about tea.", "encrypted_content": "e"}
    events: list[Any] = [
        {"type": "message_start", "message": message([], "")},
        {"type": "content_block_start", "index": 0, "content_block": compaction},
        {"type": "content_block_delta", "index": 0, "delta": piece},
        {"type": "message_delta", "delta": {"stop_reason": "compaction"}, "usage": {"output_tokens": 5}},
    ]

    def reply(body: dict[str, Any]) -> Sent:
        asked.append(body)
        return Sent((sse(*events),), STREAM) if len(asked) == 1 else streamed(REST, "end_turn")

    async with answering(reply) as url:
        found = await ask(client_of(ANTHROPIC, url), on_delta=Heard())

    whole_block = {
        **compaction,
        "content": "They talked about tea.",
        "encrypted_content": "e",
    }
    assert asked[1]["messages"][-1] == {"role": "assistant", "content": [whole_block]}
    assert found.content[0] == whole_block
    assert found.finish_reason == FinishReason.STOP


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


@dataclass
class Recorded:
    """The limits of an attempt, which record what is reserved and how it ends."""

    tenant: str = ""
    reserved: list[tuple[int, bool]] = field(default_factory=list)
    """The requests per minute, and whether the run may be parked."""
    ended: list[int | None] = field(default_factory=list)
    in_use: int = 0

    async def reserve(self, limit: RequestLimit, tokens: int) -> Recorded:
        assert self.in_use == 0, "the request before has ended"
        self.in_use += 1
        call = current_call.get()
        assert call is not None
        self.reserved.append((limit.requests_per_minute, call.may_suspend))
        return self

    def end(self, *, used: int | None = None, was_sent: bool = True, retry_after_ms: int = 0) -> None:
        self.in_use -= 1
        self.ended.append(used)


async def test_each_part_of_a_paused_reply_is_a_request_for_the_limits_of_the_fleet() -> None:
    """With its own tokens. The run is not parked between two parts: those before would be paid for again."""
    asked: list[Any] = []

    def reply(body: dict[str, Any]) -> Sent:
        asked.append(body)
        if len(asked) == 2:
            return Sent((), JSON, "500 Error")
        return whole(PAUSED, "pause_turn") if len(asked) == 1 else whole(REST, "end_turn")

    limits = Recorded()
    token = current_call.set(CallInfo("r", "c", "k", 0, may_suspend=True, kind="model", limits=limits))
    try:
        async with answering(reply) as url:
            found = await ask(client_of(ANTHROPIC, url, limits={"requests_per_minute": 60}))
    finally:
        current_call.reset(token)

    assert found.usage is not None
    assert found.usage.total_tokens == 30
    assert limits.reserved == [(60, True), (60, False), (60, False)]
    assert limits.ended == [15, None, 15]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_no_call_of_a_refused_reply_is_executed(is_streamed: bool) -> None:
    """The provider stops a reply in the middle. The calls before that belong to what it refuses."""
    content = [
        {"type": "text", "text": "I do. "},
        {"type": "tool_use", "id": "t", "name": "add", "input": {}},
    ]
    sent = (streamed if is_streamed else whole)(content, "refusal")

    async with answering(lambda _: sent) as url:
        client = client_of(ANTHROPIC, url)
        found = await ask(client, tools=TOOLS, **({"on_delta": Heard()} if is_streamed else {}))

    assert (found.finish_reason, found.tool_calls) == (FinishReason.REFUSAL, ())
    assert found.output_text == "I do. "


@pytest.mark.parametrize(
    ("costs", "stated"), [((0.25, 0.5), 0.75), ((0.25, None), None), ((None, 0.5), None)]
)
async def test_a_gateway_states_the_cost_of_each_part(
    costs: tuple[float | None, float | None], stated: float | None
) -> None:
    """The call costs their sum. If the cost of a part is not stated, that of the call is not known."""
    asked = []

    def reply(body: dict[str, Any]) -> Sent:
        asked.append(body)
        cost = costs[len(asked) - 1]
        head = JSON if cost is None else f"{JSON}\r\nx-litellm-response-cost: {cost}"
        return whole(PAUSED, "pause_turn", head) if len(asked) == 1 else whole(REST, "end_turn", head)

    async with answering(reply) as url:
        found = await ask(client_of(ANTHROPIC, url))

    assert found.usage is not None
    assert found.usage.metadata.get("stated_cost_usd") == stated


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


@pytest.mark.parametrize("content", [5, None, "text", {"type": "text"}])
async def test_a_later_part_that_is_not_a_message_is_an_invalid_reply(content: Any) -> None:
    asked = []

    def reply(body: dict[str, Any]) -> Sent:
        asked.append(body)
        return whole(PAUSED if len(asked) == 1 else content, "pause_turn" if len(asked) == 1 else "end_turn")

    async with answering(reply) as url:
        with pytest.raises(LLMResponseError, match="not a message"):
            await ask(client_of(ANTHROPIC, url), HI)


async def test_an_error_in_a_later_part_is_the_error_of_the_call() -> None:
    asked = []

    def reply(body: dict[str, Any]) -> Sent:
        asked.append(body)
        return whole(PAUSED, "pause_turn") if len(asked) == 1 else Sent((), JSON, "401 Unauthorized")

    async with answering(reply) as url:
        with pytest.raises(LLMAuthError):
            await ask(client_of(ANTHROPIC, url), HI)
