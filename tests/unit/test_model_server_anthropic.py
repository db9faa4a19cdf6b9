"""Anthropic's Messages API as the model server speaks it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from openagents_worker.testing.model_server import ModelServer, ModelServerRequest

HEADERS = {"anthropic-version": "2026-10-21", "x-api-key": "k"}
HI = {"role": "user", "content": "hi"}
ADD = {"name": "add", "input_schema": {"type": "object"}}
SEARCH = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "tea"}}
FOUND = {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []}
BOTH = {
    "text": "two words",
    "tool_calls": [
        {"name": "add", "arguments": {"number": 12345}},
        {"name": "now", "id": "mine"},
    ],
    "usage": {"input_tokens": 100, "output_tokens": 20, "cached_tokens": 40},
}


async def _post(server: ModelServer, *messages: Any, **body: Any) -> httpx.Response:
    body = {"model": "claude", "max_tokens": 1024, "messages": messages, **body}
    async with httpx.AsyncClient(headers=HEADERS) as http:
        return await http.post(f"{server.url}/messages", json=body)


def _events(reply: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each under the name that its data says."""
    events = []
    for text in reply.text.removesuffix("\n\n").split("\n\n"):
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def _uses(*ids: str) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": call_id, "name": "add", "input": {}} for call_id in ids],
    }


def _results(*ids: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": call_id, "content": "1"} for call_id in ids],
    }


# --- replies ---------------------------------------------------------------------------------------------


async def test_a_whole_reply_is_a_message() -> None:
    """Text, then a block for each call; tokens from the cache are counted beside the others."""
    async with ModelServer(lambda _: BOTH) as server:
        message = (await _post(server, HI)).json()

    text, add, now = message["content"]
    assert text == {"type": "text", "text": "two words"}
    assert (add["type"], add["name"], add["input"]) == ("tool_use", "add", {"number": 12345})
    assert (now["id"], now["input"]) == ("mine", {})
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "claude")
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    assert message["usage"] == {
        "input_tokens": 60,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 40,
        "output_tokens": 20,
    }


async def test_a_stream_is_what_anthropic_sends() -> None:
    """Each block begins empty, grows and stops; the reason and the tokens come before the end."""
    async with ModelServer(lambda _: BOTH) as server:
        reply = await _post(server, HI, stream=True)
        whole = (await _post(server, HI)).json()

    events = _events(reply)
    start, stop = events[0]["message"], events[-2]
    assert reply.headers["content-type"] == "text/event-stream"
    assert [event["type"].removeprefix("content_block_") for event in events] == [
        *("message_start", "start", "ping", "delta", "delta", "stop"),
        *("start", "delta", "delta", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("message_delta", "message_stop"),
    ]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"] == whole["usage"] | {"output_tokens": 1}
    assert stop["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert stop["usage"] == whole["usage"]
    assert _put_together(events) == whole["content"]


def _put_together(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The content of a message from the events of its stream, as a client does it."""
    blocks: list[dict[str, Any]] = []
    written = ""
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
                written = ""
            case "content_block_delta" if event["delta"]["type"] == "text_delta":
                blocks[event["index"]]["text"] += event["delta"]["text"]
            case "content_block_delta":
                written += event["delta"]["partial_json"]
            case "content_block_stop" if blocks[event["index"]]["type"] == "tool_use":
                blocks[event["index"]]["input"] = json.loads(written)
    return blocks


async def test_arguments_that_are_no_json_are_streamed_as_they_were_written() -> None:
    """A whole reply has no place for them: there the input is the text."""
    entry = {"text": "", "tool_calls": [{"name": "add", "arguments": "{oops"}]}
    async with ModelServer(lambda _: entry) as server:
        events = _events(await _post(server, HI, stream=True))
        whole = (await _post(server, HI)).json()

    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta["partial_json"] for delta in deltas) == "{oops"
    assert whole["content"][0]["input"] == "{oops"


async def test_ids_of_calls_are_the_same_on_every_try_and_unique_in_a_conversation() -> None:
    """Anthropic refuses a conversation in which two calls share an id; ours can be sent back."""
    call = {"tool_calls": [{"name": "add"}, {"name": "add"}]}
    async with ModelServer([call]) as server:
        first, again = [(await _post(server, HI)).json()["content"] for _ in range(2)]
        ids = [block["id"] for block in first]
        history = (HI, {"role": "assistant", "content": first}, _results(*ids), HI)
        later = await _post(server, *history)

    assert first == again
    assert later.status_code == 200
    assert len({*ids, *(block["id"] for block in later.json()["content"])}) == 4


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        ({"error": "rate_limit"}, 429, "rate_limit_error"),
        ({"error": "server_error"}, 500, "api_error"),
        ({"error": "server_error", "status": 529}, 529, "overloaded_error"),
        ({"error": "server_error", "status": 503}, 503, "api_error"),
        ({"error": "server_error", "status": 504}, 504, "timeout_error"),
        ({"error": "response"}, 400, "invalid_request_error"),
        ({"error": "response", "status": 401}, 401, "authentication_error"),
        ({"error": "response", "status": 404}, 404, "not_found_error"),
        ({"error": "response", "status": 422}, 422, "invalid_request_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_has_the_type_of_its_status(
    fault: dict[str, Any], status: int, kind: str, stream: bool
) -> None:
    """The number of the request stands in its header and in its body."""
    async with ModelServer(lambda _: {**fault, "message": "so it is"}) as server:
        reply = await _post(server, HI, stream=stream)

    assert reply.status_code == status
    assert reply.json() == {
        "type": "error",
        "error": {"type": kind, "message": "so it is"},
        "request_id": reply.headers["request-id"],
    }


# --- what is asked ---------------------------------------------------------------------------------------


async def test_what_is_not_text_is_handed_on_as_it_came() -> None:
    """An image stays a block; results come before what the user says beside them; failures are marked."""
    asked: list[ModelServerRequest] = []

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append(request)
        return {"text": "ok"}

    image = {"type": "image", "source": {"type": "url", "url": "https://x.test/a.png"}}
    failed = {"type": "tool_result", "tool_use_id": "a", "is_error": True}
    async with ModelServer(reply) as server:
        await _post(
            server,
            {"role": "user", "content": [image, {"type": "text", "text": "what?"}]},
            _uses("a"),
            {
                "role": "user",
                "content": [failed, {"type": "text", "text": "go"}, {"type": "text", "text": "on"}],
            },
            system=[{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}],
        )

    system, picture, _, result, said = asked[0].messages
    assert system == {"role": "system", "content": "Be kind."}
    assert picture == {"role": "user", "content": [image, {"type": "text", "text": "what?"}]}
    assert result == {"role": "tool", "tool_call_id": "a", "content": "", "is_error": True}
    assert said == {"role": "user", "content": "goon"}
    assert asked[0].n == 0


@pytest.mark.parametrize(
    "messages",
    [
        [HI, _uses("a", "b"), _results("b", "a")],
        [HI, _uses("a", "b"), _results("a"), _results("b"), HI],
        [HI, _uses("a"), _uses("b"), _results("a", "b")],
        [HI, HI, {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": ""}],
        [_uses("a"), _results("a")],
        [HI, {"role": "assistant", "content": [SEARCH, FOUND]}],
    ],
)
async def test_messages_of_one_role_in_a_row_are_one_turn(messages: list[Any]) -> None:
    """What Anthropic takes, the server takes."""
    async with ModelServer(lambda _: {"text": "ok"}) as server:
        reply = await _post(server, *messages)

    assert reply.status_code == 200


async def test_tools_of_the_provider_are_accepted_beside_ours() -> None:
    """Their fields are not checked. They can be chosen, too."""
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    async with ModelServer(lambda _: {"text": "ok"}) as server:
        for tools in ([search], [ADD, search]):
            reply = await _post(server, HI, tools=tools, tool_choice={"type": "tool", "name": "web_search"})
            assert reply.status_code == 200, reply.text


UNANSWERED = (
    "messages.1: `tool_use` ids were found without `tool_result` blocks immediately after: a. Each `tool_use`"
    " block must have a corresponding `tool_result` block in the next message."
)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([HI, _uses("a")], UNANSWERED),
        ([HI, _uses("a"), HI], UNANSWERED),
        ([HI, _uses("a"), HI, _results("a")], UNANSWERED),
        (
            [_results("a")],
            "messages.0.content.0: unexpected `tool_use_id` found in `tool_result` blocks: a. Each"
            " `tool_result` block must have a corresponding `tool_use` block in the previous message.",
        ),
        (
            [HI, _uses("a"), _results("a", "a")],
            "messages.2.content.1: each tool_use must have a single result. Found multiple `tool_result`"
            " blocks with id: a",
        ),
        ([HI, _uses("a", "a"), _results("a")], "messages.1.content.1: `tool_use` ids must be unique"),
        (
            [HI, _uses("a"), _results("a"), _uses("a"), _results("a")],
            "messages.3.content.0: `tool_use` ids must be unique",
        ),
        (
            [_uses("a") | {"role": "user"}],
            "messages.0.content.0: `tool_use` blocks can only be in `assistant` messages",
        ),
        (
            [HI, _results("a") | {"role": "assistant"}],
            "messages.1.content.0: `tool_result` blocks can only be in `user` messages",
        ),
        (
            [HI, _uses("call:1"), _results("call:1")],
            "messages.1.content.0.tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'",
        ),
    ],
)
async def test_calls_and_results_come_in_pairs(messages: list[Any], problem: str) -> None:
    """Each call is answered once, at the beginning of the next turn, in the API's own words."""
    async with ModelServer(lambda _: {"text": "never"}) as server:
        reply = await _post(server, *messages)

    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert reply.json()["error"]["message"] == problem
    assert server.log == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"messages": []}, "messages: at least one message is required"),
        ({"system": [{"type": "text", "text": ""}]}, "system: text content blocks must be non-empty"),
        ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": None}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"response_format": {}}, "response_format: Extra inputs are not permitted"),
        ({"temperature": 1}, "temperature: Extra inputs are not permitted"),
        (
            {"messages": [{"role": "tool", "content": "1"}]},
            "messages.0.role: Input should be 'user', 'assistant'",
        ),
        ({"messages": [HI | {"tool_calls": []}]}, "messages.0.tool_calls: Extra inputs are not permitted"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages.0.content: Input should be a valid list",
        ),
        (
            {"messages": [{"role": "user", "content": ""}]},
            "messages.0: all messages must have non-empty content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]},
            "messages: text content blocks must be non-empty",
        ),
        (
            {"messages": [HI, {"role": "assistant", "content": "once "}]},
            "messages: final assistant content cannot end with trailing whitespace",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]},
            "messages.0.content.0: `server_tool_use` blocks can only be in `assistant` messages",
        ),
        (
            {
                "messages": [
                    HI,
                    {"role": "assistant", "content": [{"type": "server_tool_use", "input": "{}"}]},
                ]
            },
            "messages.1.content.0.server_tool_use.input: Input should be",
        ),
        ({"messages": [{"role": "system", "content": "x"}, HI]}, 'messages: Unexpected role "system"'),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.name: Field required"),
        ({"tools": [{"name": "add"}]}, "tools.0.input_schema: Field required"),
        (
            {"tools": [{"name": "a b", "input_schema": {"type": "object"}}]},
            "tools.0.name: String should match",
        ),
        ({"tools": [{"name": "add", "input_schema": {}}]}, "tools.0.input_schema.type: Field required"),
        ({"tools": [ADD, ADD]}, "tools: Tool names must be unique."),
        ({"tool_choice": {"type": "auto"}}, "tool_choice may only be specified while providing tools."),
        ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "tool_choice.tool.name: Field required"),
        (
            {"tools": [ADD], "tool_choice": {"type": "tool", "name": "x"}},
            "Tool 'x' not found in provided tools",
        ),
        ({"tools": [ADD], "tool_choice": "auto"}, "tool_choice: Input should be a valid dictionary"),
    ],
)
async def test_a_bad_request_is_refused_in_the_apis_words(body: dict[str, Any], problem: str) -> None:
    """The field that is wrong, and what is wrong with it."""
    async with ModelServer(lambda _: {"text": "never"}) as server:
        reply = await _post(server, **({"messages": [HI]} | body))

    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert reply.json()["error"]["message"].startswith(problem)


@pytest.mark.parametrize("missing", ["model", "messages", "max_tokens"])
async def test_three_fields_are_required(missing: str) -> None:
    """`max_tokens` is one of them, other than with OpenAI."""
    body = {"model": "claude", "max_tokens": 1, "messages": [HI]}
    del body[missing]
    async with ModelServer([]) as server, httpx.AsyncClient(headers=HEADERS) as http:
        reply = await http.post(f"{server.url}/messages", json=body)

    assert reply.json()["error"]["message"] == f"{missing}: Field required"


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({}, "anthropic-version: header is required"),
        ({"anthropic-version": "2024-10-22"}, 'anthropic-version: "2024-10-22" is not a valid version'),
    ],
)
async def test_the_version_of_the_api_is_named(headers: dict[str, str], problem: str) -> None:
    """A request without one is refused before anything else is looked at."""
    async with ModelServer([]) as server, httpx.AsyncClient(headers=headers) as http:
        reply = await http.post(f"{server.url}/messages", json={})

    assert (reply.status_code, reply.json()["error"]["message"]) == (400, problem)


@pytest.mark.parametrize(("version", "status"), [("2023-06-01", 200), ("2026-10-21", 400)])
@pytest.mark.parametrize("parameter", ["temperature", "top_p", "top_k"])
async def test_sampling_parameters_belong_to_the_older_version(
    version: str, status: int, parameter: str
) -> None:
    """The newer one removed them, for every model and every value."""
    body = {"model": "claude", "max_tokens": 1, "messages": [HI], parameter: 1}
    async with (
        ModelServer([{"text": "ok"}]) as server,
        httpx.AsyncClient(headers={"anthropic-version": version}) as http,
    ):
        reply = await http.post(f"{server.url}/messages", json=body)

    assert reply.status_code == status
