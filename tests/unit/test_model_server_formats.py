"""What the model server does in every wire format: one script, one log, one set of faults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.support.waiting import PATIENCE_S

CALLED_WITH = {"x": 1, "note": "ünï 💡"}


@dataclass(frozen=True)
class Format:
    """One conversation and one reply, as this format has them."""

    path: str
    conversation: Mapping[str, Any]
    """A system prompt, a question, a call of `add` that failed; the answer is asked for."""
    question: Mapping[str, Any]
    rate_limited: Mapping[str, Any]
    number: str
    """The header that tells an answer from every other."""
    stop: Mapping[str, str]
    last_event: str
    max_tokens: str = "max_tokens"
    headers: Mapping[str, str] = field(default_factory=dict)

    async def post(self, server: ModelServer, body: Mapping[str, Any], **headers: str) -> httpx.Response:
        async with httpx.AsyncClient(headers={**self.headers, **headers}, timeout=PATIENCE_S) as http:
            return await http.post(server.url + self.path, json=body)


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}

OPENAI = Format(
    path="/chat/completions",
    question={"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    conversation={
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": "I add.",
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "add", "arguments": '{"x":1,"note":"ünï 💡"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "no"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {"name": "add", "parameters": SCHEMA, "description": "adds"},
            }
        ],
    },
    rate_limited={"error": {"code": "rate_limit_exceeded"}},
    number="x-request-id",
    stop={"end": "stop", "tools": "tool_calls", "cut": "length"},
    last_event="data: [DONE]\n\n",
)

ANTHROPIC = Format(
    path="/messages",
    headers={"anthropic-version": "2023-06-01", "x-api-key": "k"},
    question={"model": "m", "max_tokens": 99, "messages": [{"role": "user", "content": "hi"}]},
    conversation={
        "model": "m",
        "max_tokens": 99,
        "system": "Be kind.",
        "messages": [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I add."},
                    {"type": "tool_use", "id": "c1", "name": "add", "input": CALLED_WITH},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "no"}]},
        ],
        "tools": [{"name": "add", "description": "adds", "input_schema": SCHEMA}],
    },
    rate_limited={"type": "error", "error": {"type": "rate_limit_error"}},
    number="request-id",
    stop={"end": "end_turn", "tools": "tool_use", "cut": "max_tokens"},
    last_event='event: message_stop\ndata: {"type":"message_stop"}\n\n',
)


RESPONSES = Format(
    path="/responses",
    question={"model": "m", "input": "hi"},
    conversation={
        "model": "m",
        "instructions": "Be kind.",
        "input": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "I add.", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"x":1,"note":"ünï 💡"}'},
            {"type": "function_call_output", "call_id": "c1", "output": "no"},
        ],
        "tools": [
            {"type": "function", "name": "add", "description": "adds", "parameters": SCHEMA, "strict": False}
        ],
    },
    rate_limited={"error": {"code": "rate_limit_exceeded"}},
    number="x-request-id",
    stop={"end": "completed", "tools": "completed", "cut": "max_output_tokens"},
    last_event="event: response.completed\n",
    max_tokens="max_output_tokens",
)


@pytest.fixture(params=[OPENAI, ANTHROPIC, RESPONSES], ids=["openai", "anthropic", "responses"])
def wire(request: pytest.FixtureRequest) -> Format:
    wire: Format = request.param
    return wire


def _stop_reason(reply: httpx.Response) -> str:
    body = reply.json()
    if "output" in body:
        why: str = (body["incomplete_details"] or {"reason": body["status"]})["reason"]
        return why
    reason: str = body["choices"][0]["finish_reason"] if "choices" in body else body["stop_reason"]
    return reason


# --- what is asked ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_is_asked_the_same_in_every_format(wire: Format, stream: bool) -> None:
    """A function sees OpenAI's messages and tools, so it need not know who talks to it."""
    asked: list[ModelServerRequest] = []

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append(request)
        return {"text": "ok"}

    body = {**wire.conversation, "stream": stream}
    async with ModelServer(reply) as server:
        await wire.post(server, body)

    [request] = asked
    assert list(request.messages) == OPENAI.conversation["messages"]
    assert list(request.tools) == OPENAI.conversation["tools"]
    assert (request.model, request.stream, request.n) == ("m", stream, 1)
    assert request.body == body


async def test_the_log_has_the_same_fields_in_every_format(wire: Format) -> None:
    """Two lines a request; the key of the provider is not among them."""
    async with ModelServer([{"text": "one"}, {"text": "two"}]) as server:
        await wire.post(server, wire.conversation, **{"idempotency-key": "r:0", "x-call": "main.0"})

    received, answered = ({name: e[name] for name in e if name != "at"} for e in server.log)
    assert received == {
        "event": "received",
        "id": 1,
        "call": "main.0",
        "key": "r:0",
        "model": "m",
        "messages": OPENAI.conversation["messages"],
        "tools": ["add"],
        "stream": False,
    }
    assert answered == {"event": "answered", "id": 1, "status": 200}


async def test_a_script_answers_each_turn_with_its_reply(wire: Format) -> None:
    """A tool's result opens no new turn, though it is a user's message in one of the formats."""
    async with ModelServer([{"text": "one"}, {"text": "two"}]) as server:
        first = await wire.post(server, wire.question)
        second = await wire.post(server, wire.conversation)

    assert ("one" in first.text, "two" in second.text) == (True, True)


@pytest.mark.parametrize("body", [b"no json", b"[]", b'{"model": "m"}', b'{"messages": [1], "model": "m"}'])
async def test_what_is_no_request_is_refused_and_not_logged(wire: Format, body: bytes) -> None:
    """It reaches no script."""
    async with ModelServer([{"text": "never"}]) as server, httpx.AsyncClient(headers=wire.headers) as http:
        reply = await http.post(server.url + wire.path, content=body)

    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert server.log == []


# --- what is answered ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"text": "hello"}, "end"),
        ({"text": "", "tool_calls": [{"name": "add"}]}, "tools"),
        ({"text": "Once upon", "usage": {"output_tokens": 99}}, "cut"),
        ({"text": "Once upon", "usage": {"output_tokens": 98}}, "end"),
    ],
)
async def test_a_reply_says_why_it_ended(wire: Format, entry: dict[str, Any], reason: str) -> None:
    """It used all tokens it might: it was cut. Else it wants its tools, or has said everything."""
    async with ModelServer(lambda _: entry) as server:
        reply = await wire.post(server, {**wire.conversation, wire.max_tokens: 99})

    assert _stop_reason(reply) == wire.stop[reason]


async def test_every_answer_has_a_number(wire: Format) -> None:
    """Replies, refusals and streams carry it; no two are the same."""
    script = [{"error": "rate_limit"}, {"text": "ok"}]
    async with ModelServer(script) as server:
        replies = [
            await wire.post(server, wire.question),
            await wire.post(server, {}),
            await wire.post(server, wire.question),
            await wire.post(server, {**wire.question, "stream": True}),
        ]

    assert [reply.status_code for reply in replies] == [429, 400, 200, 200]
    assert len({reply.headers[wire.number] for reply in replies}) == 4


# --- faults ----------------------------------------------------------------------------------------------


async def test_faults_meet_the_first_tries_of_a_call(wire: Format) -> None:
    """Tries are told apart by the messages, or by `Idempotency-Key` where there is one."""
    script = [{"error": "rate_limit", "retry_after_ms": 1200}, {"error": "server_error"}, {"text": "ok"}]
    async with ModelServer(script) as server:
        keyless = [await wire.post(server, wire.question) for _ in range(3)]
        keyed = [await wire.post(server, wire.question, **{"idempotency-key": "a"}) for _ in range(3)]

    for replies in (keyless, keyed):
        assert [reply.status_code for reply in replies] == [429, 500, 200]
    limited = keyless[0]
    assert (limited.headers["retry-after-ms"], limited.headers["retry-after"]) == ("1200", "2")
    assert limited.json()["error"].items() >= wire.rate_limited["error"].items()


@pytest.mark.share(of=3)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("connection", httpx.RemoteProtocolError),
        ("disconnect", httpx.RemoteProtocolError),
        ("reset", (httpx.ReadError, httpx.RemoteProtocolError)),
        ("hang", httpx.ReadTimeout),
        ("slow_headers", httpx.ReadTimeout),
        ("slow_body", httpx.ReadTimeout),
    ],
)
async def test_a_connection_breaks_as_scripted(
    wire: Format, fault: str, error: type[httpx.TransportError], stream: bool
) -> None:
    """The client gets no complete reply. Of a slow one it gets no more bytes until it gives up."""
    waits = error is httpx.ReadTimeout
    async with (
        ModelServer(lambda _: {"error": fault}) as server,
        httpx.AsyncClient(headers=wire.headers, timeout=0.2 if waits else PATIENCE_S) as http,
    ):
        with pytest.raises(error):
            await http.post(server.url + wire.path, json={**wire.question, "stream": stream})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_reply_with_status_200_may_be_unusable(wire: Format, stream: bool) -> None:
    """A page of HTML, bytes that are not text, half a character, an error with status 200."""
    faults = ("wrong_content_type", "garbage", "half_character", "error_in_200")
    script = [{"error": fault, "message": "no more"} for fault in faults]
    async with ModelServer([*script, {"text": "ok"}]) as server:
        page, garbage, half, failed = [
            await wire.post(server, {**wire.question, "stream": stream}) for _ in faults
        ]

    assert {reply.status_code for reply in (page, garbage, half, failed)} == {200}
    assert (page.headers["content-type"], "Please sign in" in page.text) == ("text/html", True)
    assert b"\xff\xfe" in garbage.content
    assert "half" in half.text
    with pytest.raises(UnicodeDecodeError):
        half.content.decode()
    assert "no more" in failed.text
    assert wire.last_event not in failed.text or not stream


async def test_an_overloaded_server_answers_529(wire: Format) -> None:
    """It is Anthropic's status; other providers and gateways send it too."""
    async with ModelServer(lambda _: {"error": "overloaded"}) as server:
        assert (await wire.post(server, wire.question)).status_code == 529


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_and_refusals_are_in_the_fields_of_the_format(wire: Format, stream: bool) -> None:
    """A script has them without regard to the format."""
    script = [{"refusal": "I will not.", "reasoning": "Is it harmful?"}]
    async with ModelServer(script) as server:
        reply = await wire.post(server, {**wire.question, "stream": stream})

    place = {
        "/chat/completions": ("reasoning_content", '"refusal":'),
        "/messages": ('"type":"thinking"', '"stop_reason":"refusal"'),
        "/responses": ('"type":"reasoning"', '"type":"refusal"'),
    }[wire.path]
    assert all(text in reply.text for text in place)


async def test_a_stream_may_end_before_it_is_whole(wire: Format) -> None:
    """`cut_stream` ends politely in the middle; only the last event is proof of the end."""
    async with ModelServer([{"error": "cut_stream"}, {"text": "whole"}]) as server:
        torn, whole = [await wire.post(server, {**wire.question, "stream": True}) for _ in range(2)]

    assert "This " in torn.text
    assert wire.last_event in whole.text
    assert wire.last_event not in torn.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_body_may_be_no_json(wire: Format, stream: bool) -> None:
    """200, and JSON by its own account."""
    async with ModelServer(lambda _: {"error": "bad_json"}) as server:
        reply = await wire.post(server, {**wire.question, "stream": stream})

    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    with pytest.raises(ValueError):
        json.loads(reply.text)
