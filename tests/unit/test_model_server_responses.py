"""OpenAI's responses API as the model server implements it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.support.waiting import PATIENCE_S, await_for

HI = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "3"}
ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
BOTH = {
    "text": "two words",
    "reasoning": "think a bit",
    "tool_calls": [{"name": "add", "arguments": {"number": 12345}}],
    "usage": {"input_tokens": 100, "output_tokens": 20, "cached_tokens": 40},
}
ENCRYPTED = {"include": ["reasoning.encrypted_content"], "store": False}


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        yield client


async def _post(http: httpx.AsyncClient, server: ModelServer, **body: Any) -> httpx.Response:
    return await http.post(f"{server.url}/responses", json={"model": "m", "input": "hi", **body})


def _events(reply: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, each under the name in its data."""
    events = []
    for text in reply.text.removesuffix("\n\n").split("\n\n"):
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


# --- replies ---------------------------------------------------------------------------------------------


async def test_a_reply_is_a_list_of_items(http: httpx.AsyncClient) -> None:
    """The reasoning, the message and a call, and the token counts."""
    async with ModelServer(lambda _: BOTH) as server:
        body = (await _post(http, server, **ENCRYPTED)).json()

    reasoning, message, call = body["output"]
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "m")
    assert (reasoning["summary"][0]["text"], reasoning["encrypted_content"][:5]) == ("think a bit", "seal_")
    assert message["content"][0]["text"] == "two words"
    assert (call["name"], call["arguments"], call["id"][:3]) == ("add", '{"number":12345}', "fc_")
    assert call["call_id"] != call["id"]
    assert body["usage"]["input_tokens_details"]["cached_tokens"] == 40


async def test_a_stream_ends_with_the_whole_reply(http: httpx.AsyncClient) -> None:
    """Each item is added, grows and is done. The numbers of the events have no gap."""
    async with ModelServer(lambda _: BOTH) as server:
        events = _events(await _post(http, server, stream=True))
        whole = (await _post(http, server)).json()

    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    ids = ("id", "call_id", "encrypted_content")
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    for items in (done, whole["output"], last := events[-1]["response"]["output"]):
        for item in items:
            for name in ids:
                item.pop(name, None)
    assert done == whole["output"] == last
    text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    arguments = "".join(e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta")
    assert (text, arguments) == ("two words", '{"number":12345}')


async def test_a_reply_can_be_sent_back(http: httpx.AsyncClient) -> None:
    """With its reasoning, which the server recognises without having stored it."""
    asked: list[ModelServerRequest] = []

    def reply(request: ModelServerRequest) -> dict[str, Any]:
        asked.append(request)
        return BOTH if request.n == 0 else {"text": "done"}

    async with ModelServer(reply) as server:
        first = (await _post(http, server, **ENCRYPTED)).json()["output"]
        output = OUTPUT | {"call_id": first[-1]["call_id"]}
        second = await _post(http, server, input=[HI, *first, output], **ENCRYPTED)

    assert second.json()["output"][0]["content"][0]["text"] == "done"
    assert [message["role"] for message in asked[1].messages] == ["user", "assistant", "tool"]
    assert asked[1].messages[1]["content"] == "two words"


# --- requests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"messages": [HI]}, "Unknown parameter: 'messages'."),
        ({"max_tokens": 5}, "Unknown parameter: 'max_tokens'."),
        ({"previous_response_id": "resp_1"}, "Unsupported parameter: 'previous_response_id'"),
        ({"model": ""}, "Missing required parameter: 'model'."),
        ({"input": []}, "Missing required parameter: 'input'."),
        ({"max_output_tokens": 5}, "Invalid 'max_output_tokens': integer below minimum value."),
        ({"background": True, "store": False}, "Background mode requires store to be true."),
        ({"input": [{"role": "tool", "content": "x"}]}, "Invalid value: 'tool'."),
        ({"input": [{"role": "user", "content": " "}]}, "Invalid value for 'input[0].content'"),
        (
            {"input": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
            "Invalid value: 'text'. Supported values are: 'input_text', 'input_image', 'input_file'.",
        ),
        (
            {"input": [{"role": "assistant", "content": [{"type": "input_text", "text": "x"}]}]},
            "Invalid value: 'input_text'. Supported values are: 'output_text', 'refusal'.",
        ),
        ({"input": [HI, CALL | {"id": "call_1"}, OUTPUT]}, "Invalid 'input[1].id': 'call_1'. Expected an ID"),
        ({"input": [HI, CALL]}, "No tool output found for function call c1."),
        ({"input": [HI, OUTPUT]}, "No tool call found for function call output with call_id c1."),
        ({"input": [HI, CALL, OUTPUT, CALL, OUTPUT]}, "Duplicate item found with call_id c1."),
        ({"input": [HI, CALL | {"arguments": {}}, OUTPUT]}, "Invalid type for 'input[1].arguments'"),
        (
            {"input": [HI, {"type": "reasoning", "id": "rs_1", "summary": []}]},
            "Item with id 'rs_1' not found.",
        ),
        (
            {
                "input": [
                    {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
                    CALL,
                    OUTPUT,
                ]
            },
            "The encrypted content for item rs_1 could not be verified.",
        ),
        ({"tools": [{"type": "function", "function": {"name": "add"}}]}, "Unknown parameter: 'tools[0]"),
        (
            {"tools": [{"type": "function", "name": "add"}]},
            "Missing required parameter: 'tools[0].parameters'",
        ),
        ({"tools": [ADD, ADD]}, "Invalid 'tools[1].name': names of tools must be unique."),
        ({"tools": [ADD | {"strict": True}]}, "Invalid schema for function 'add': In context=()"),
        ({"tool_choice": "required"}, "Invalid value for 'tool_choice'"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {}}}},
            "Missing required parameter: 'text.format",
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}},
            "Invalid 'text.format.name': string does not match pattern.",
        ),
    ],
)
async def test_an_invalid_request_is_refused_in_the_words_of_the_api(
    http: httpx.AsyncClient, body: dict[str, Any], problem: str
) -> None:
    """The parameter, and what is wrong with it."""
    async with ModelServer(lambda _: {"text": "never"}) as server:
        reply = await _post(http, server, **body)

    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert reply.json()["error"]["message"].startswith(problem)
    assert server.log == []


async def test_tools_of_the_provider_are_accepted_beside_ours(http: httpx.AsyncClient) -> None:
    """Their fields are not checked. They can be chosen, too."""
    search = {"type": "web_search", "search_context_size": "low"}
    async with ModelServer(lambda _: {"text": "ok"}) as server:
        for tools in ([search], [ADD, search]):
            for choice in ("required", {"type": "web_search"}):
                reply = await _post(http, server, tools=tools, tool_choice=choice)
                assert reply.status_code == 200, reply.text


# --- the background --------------------------------------------------------------------------------------


async def test_a_response_in_the_background_outlives_its_connection(http: httpx.AsyncClient) -> None:
    """The stream breaks; its id and the number of its last event are enough to read the rest."""
    script = [{"error": "reset"}, {"text": "one two three four five six"}]
    async with ModelServer(script) as server:
        got: list[dict[str, Any]] = []

        async def read() -> None:
            body = {"model": "m", "input": "hi", "background": True, "stream": True}
            async with http.stream("POST", f"{server.url}/responses", json=body) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data: "):
                        got.append(json.loads(line[6:]))

        with pytest.raises(httpx.TransportError):
            await read()
        name, last = got[0]["response"]["id"], got[-1]["sequence_number"]
        url = f"{server.url}/responses/{name}"
        rest = _events(await http.get(url, params={"stream": "true", "starting_after": last}))
        state = (await http.get(url)).json()

    assert got[0]["response"]["status"] == "queued"
    numbers = [event["sequence_number"] for event in [*got, *rest]]
    assert numbers == list(range(len(numbers)))
    assert rest[-1]["response"] == state
    assert state["output"][0]["content"][0]["text"] == "one two three four five six"
    assert [e["event"] for e in server.log] == ["received", "answered", "retrieved", "retrieved"]


async def test_a_response_in_the_background_can_be_polled_and_cancelled(http: httpx.AsyncClient) -> None:
    """A cancelled one stays cancelled and has no output; an unknown one is a 404."""
    async with ModelServer(lambda _: {"text": "slow", "latency_ms": 3_600_000}) as server:
        queued = (await _post(http, server, background=True)).json()
        url = f"{server.url}/responses/{queued['id']}"
        cancelled = (await http.post(f"{url}/cancel")).json()
        later = (await http.get(url)).json()
        unknown = await http.get(f"{server.url}/responses/resp_77")

    assert (queued["status"], queued["output"]) == ("queued", [])
    assert cancelled == later
    assert (later["status"], later["output"], later["usage"]) == ("cancelled", [], None)
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (
        404,
        "Response with id 'resp_77' not found.",
    )


async def test_a_response_in_the_background_can_fail(http: httpx.AsyncClient) -> None:
    """Its state has the error then."""
    async with ModelServer(lambda _: {"error": "error_in_200", "message": "no more"}) as server:
        url = f"{server.url}/responses/{(await _post(http, server, background=True)).json()['id']}"

        async def failure() -> dict[str, Any] | None:
            body: dict[str, Any] = (await http.get(url)).json()
            return body if body["status"] == "failed" else None

        failed = await await_for(failure, "the response failed")
        assert failed is not None

    assert failed["error"] == {"code": "server_error", "message": "no more"}
