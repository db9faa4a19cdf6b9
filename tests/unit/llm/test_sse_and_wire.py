"""The wire format of chat completions: building requests, and parsing replies and streams."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openagents_worker.errors import LLMResponseError
from openagents_worker.jsontext import LARGEST_INTEGER, SMALLEST_INTEGER, dumps
from openagents_worker.llm.base import LLMResponse
from openagents_worker.llm.conversation import tool_call
from openagents_worker.llm.openai_chat import messages_to_wire
from openagents_worker.llm.openai_chat_replies import reply_from_wire
from openagents_worker.llm.openai_chat_stream import StreamedReply
from openagents_worker.llm.sse import SSEDecoder

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def _cut(data: bytes, borders: list[int]) -> list[bytes]:
    marks = [0, *sorted(b % (len(data) + 1) for b in borders), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(marks)]


def _events(data: bytes, borders: list[int]) -> list[str]:
    decoder = SSEDecoder()
    return [event for chunk in _cut(data, borders) for event in decoder.feed(chunk)]


# --- events ----------------------------------------------------------------------------------------------


@given(
    events=st.lists(st.lists(TEXT, min_size=1, max_size=3), max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    borders=st.lists(st.integers(min_value=0), max_size=20),
)
def test_events_do_not_depend_on_where_the_network_cuts_them(
    events: list[list[str]], end: str, borders: list[int]
) -> None:
    """The events are the same for all line ends and chunk borders, even inside a character."""
    events = [[line.replace("\r", "").replace("\n", "") for line in lines] for lines in events]
    data = "".join("".join(f"data: {line}{end}" for line in lines) + end for lines in events)

    assert _events(data.encode(), borders) == ["\n".join(lines) for lines in events]


@pytest.mark.parametrize(
    ("data", "events"),
    [
        (b": a comment\n\ndata: x\n\n", ["x"]),
        (b"event: delta\nid: 7\nretry: 10\ndata:x\n\n", ["x"]),
        (b"\xef\xbb\xbfdata: x\r\n\r\n", ["x"]),
        (b"data\n\n", [""]),
        (b"data: whole\n\ndata: torn", ["whole"]),
        (b"data: whole\n\ndata: torn\n", ["whole"]),
    ],
)
def test_only_the_data_of_whole_events_counts(data: bytes, events: list[str]) -> None:
    """Comments, other fields, a byte-order mark and an event that the stream's end cuts off are dropped."""
    assert _events(data, []) == events


# --- messages --------------------------------------------------------------------------------------------


def test_one_turn_with_several_calls_is_one_assistant_message() -> None:
    """Tool calls go out with their arguments as JSON text, the results as tool messages with the same ids."""
    calls = [{"id": "a", "name": "add", "arguments": {"x": 1}}, {"id": "b", "name": "now", "arguments": {}}]

    wire = messages_to_wire(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "a", "name": "add", "content": "1"},
            {"role": "tool", "tool_call_id": "b", "name": "now", "content": "late", "is_error": True},
        ]
    )

    assert wire == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x":1}'}},
                {"id": "b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "late"},
    ]


NUMBERS = st.integers(SMALLEST_INTEGER, LARGEST_INTEGER)


@given(st.dictionaries(TEXT, st.none() | st.booleans() | NUMBERS | TEXT | st.lists(TEXT, max_size=2)))
def test_a_call_comes_back_from_the_wire_as_it_went_out(arguments: dict[str, Any]) -> None:
    """Neutral call → wire → neutral call changes nothing."""
    call = {"id": "c", "name": "tool", "arguments": arguments}

    message, _ = messages_to_wire(
        [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "done"},
        ]
    )
    [back] = reply_from_wire({"choices": [{"message": message}]}, provider="p").tool_calls

    assert (back.id, back.name, back.arguments, back.parse_error) == ("c", "tool", arguments, None)


NESTED = '{"x": ' + "[" * 900 + "]" * 900 + "}"


# --- tool calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "arguments"),
    [
        ('{"x": "\\ud83d"}', {"x": "\ufffd"}),
        ('{"x": "\\ud83d\\ude00"}', {"x": "😀"}),
        ('{"x": 1e999}', {"x": None}),
        (f'{{"x": {2**63}}}', {"x": str(2**63)}),
    ],
)
def test_what_json_has_no_place_for_is_replaced_in_arguments(raw: str, arguments: dict[str, Any]) -> None:
    """The tool gets the value that is stored. Its schema decides whether the value is valid."""
    call = tool_call("c", "tool", raw)

    assert (call.arguments, call.parse_error) == (arguments, None)


@pytest.mark.parametrize("raw", ["[1]", "7", "{", '{"x": NaN}', "[" * 100_000, NESTED])
def test_arguments_that_are_not_a_json_object_are_a_parse_error(raw: str) -> None:
    """The model gets the error; nothing is raised."""
    call = tool_call("c", "tool", raw)

    assert call.arguments == {}
    assert call.parse_error is not None
    assert call.raw_arguments == raw
    assert LLMResponse.from_wire(json.loads(dumps(LLMResponse(tool_calls=[call]).to_wire()))).tool_calls == (
        call,
    )


@pytest.mark.parametrize("raw", [None, "", " \n", "null", " null ", "{}", {}])
def test_a_call_without_arguments_is_a_call(raw: object) -> None:
    """Models call tools without parameters in several ways; all mean no arguments."""
    call = tool_call("c", "now", raw)

    assert (call.arguments, call.parse_error) == ({}, None)


# --- replies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [{}, {"choices": []}, {"choices": [{}]}, [], "text", None])
def test_a_reply_without_a_message_is_a_response_error(body: Any) -> None:
    """A body that is not a chat completion raises `llm.response`, never KeyError."""
    with pytest.raises(LLMResponseError, match="not a chat completion"):
        reply_from_wire(body, provider="p")


def test_a_refusal_is_the_answer() -> None:
    """A model declines in the field `refusal`; its text is the reply."""
    body = {"choices": [{"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}]}

    assert reply_from_wire(body, provider="p").output_text == "No."


def test_text_is_whole_characters() -> None:
    """A lone surrogate, which JSON allows and UTF-8 does not, is replaced."""
    reply = reply_from_wire({"choices": [{"message": {"content": "ok \ud83d"}}]}, provider="p")

    assert reply.output_text == "ok �"


def _call(index: int | None, **fields: Any) -> dict[str, Any]:
    function = {name: fields.pop(name) for name in ("name", "arguments") if name in fields}
    place = {} if index is None else {"index": index}
    return {"choices": [{"delta": {"tool_calls": [{**place, **fields, "function": function}]}}]}


@pytest.mark.parametrize("places", [(0, 1), (None, None)])
def test_call_fragments_are_put_together(places: tuple[int | None, int | None]) -> None:
    """By their index. If a server sends none, a new id starts a new call."""
    first, second = places
    reply = StreamedReply()

    for chunk in (
        _call(first, id="a", name="add", arguments=""),
        _call(first, arguments='{"x":'),
        _call(first, arguments="1}", id=None, name=None),
        _call(second, id="b", name="now", arguments="{}"),
        {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]},
        {"choices": None, "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
    ):
        reply.add(chunk)
    response = reply_from_wire(reply.body(), provider="p")

    assert [(c.id, c.name, c.arguments) for c in response.tool_calls] == [
        ("a", "add", {"x": 1}),
        ("b", "now", {}),
    ]
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (
        3,
        4,
        7,
    )


@pytest.mark.parametrize(
    "chunk", [{"choices": [3]}, {"choices": [{"delta": {"tool_calls": [1]}}]}, {"choices": 1}]
)
def test_a_chunk_that_cannot_be_read_is_a_response_error(chunk: dict[str, Any]) -> None:
    """The error says that a chunk is invalid."""
    with pytest.raises(LLMResponseError, match="chunk"):
        StreamedReply().add(chunk)
