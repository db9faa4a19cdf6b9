"""Streams with changed bytes and changed events: a reply or a coded error, and the same one for all cuts.

The corpus are the streams that the model server sends. Real in it: the decoder of events, the reading of
replies and the codecs. Only the network is missing, so that thousands of streams can be read.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import cache
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from openagents_worker.errors import LLMError
from openagents_worker.http_replies import ReplyTooLarge, ReplyUnreadable
from openagents_worker.llm import openai_chat_calls
from openagents_worker.llm.api_keys import EnvironmentKey
from openagents_worker.llm.base import Delta
from openagents_worker.llm.opaque_fields import StreamedField
from openagents_worker.llm.openai_chat_calls import StreamedCall
from openagents_worker.llm.openai_chat_replies import reply_from_wire
from openagents_worker.llm.openai_chat_stream import StreamedReply
from openagents_worker.llm.reading import Endpoint, Exchange, ReplyReading
from openagents_worker.llm.script import ScriptedReply, read_entry
from openagents_worker.llm.sse import SSEDecoder
from openagents_worker.testing.model_server.connection import event_bytes
from openagents_worker.testing.model_server.server import FORMATS as SERVED
from openagents_worker.testing.model_server.wire_format import Event, ModelServerRequest, Reply, WireFormat
from tests.unit.llm.wire import FORMATS, HI, Format

PATHS = {
    "openai_compatible": "/v1/chat/completions",
    "openai_responses": "/v1/responses",
    "anthropic": "/v1/messages",
}
TURN = {
    "text": "Let me add that. ünï 💡",
    "reasoning": "The user wants a sum.",
    "tool_calls": [{"name": "add", "arguments": {"x": 1, "note": "💡"}}, {"name": "add", "arguments": {}}],
}
EVERY = pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.provider)
EXPECTED = (LLMError, ReplyTooLarge, ReplyUnreadable, httpx.TransportError)
"""What the reading of a reply may raise. The client turns it into an error with a code."""

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
BORDERS = st.lists(st.integers(0, 5_000), max_size=12)


def _cut(data: bytes, borders: Sequence[int]) -> list[bytes]:
    marks = [0, *sorted(border % (len(data) + 1) for border in borders), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(marks)]


def _turn(provider: str) -> tuple[WireFormat, Reply]:
    """The turn in the server's format of a provider."""
    entry = read_entry(TURN, faults=(), where="the turn")
    assert isinstance(entry, ScriptedReply)
    request = ModelServerRequest(HI, (), "m", True, {}, 0, {"max_tokens": 99})
    return SERVED[PATHS[provider]], Reply(1, 1, request, entry)


@cache
def _events(provider: str) -> list[Event]:
    """The events of a stream."""
    served, reply = _turn(provider)
    return [*served.opening(reply), *served.pieces(reply), *served.closing(reply)]


def _bytes(events: Sequence[Event]) -> bytes:
    return b"".join(event_bytes(*event) for event in events)


# --- decoding --------------------------------------------------------------------------------------------


def _decoded(chunks: Sequence[bytes], limit: int | None) -> tuple[list[tuple[str, str]], bool]:
    """The names and the data of all events, and whether the limit was reached."""
    decoder = SSEDecoder(max_event_chars=limit)
    events: list[tuple[str, str]] = []
    try:
        for chunk in chunks:
            events += ((decoder.event, data) for data in decoder.feed(chunk))
    except ReplyTooLarge:
        return events, True
    return events, False


FRAGMENTS = st.sampled_from(
    [
        *(
            b"data: ",
            b"data:",
            b"data",
            b"event: ",
            b":",
            b"id: 1",
            b"\n",
            b"\r",
            b"\r\n",
            b"\n\n",
            b"\n\n\n",
        ),
        *(b"a", b" ", b"\xef\xbb\xbf", "ü💡".encode(), b"\xf0\x9f", b"\xff", b"\xed\xa0\xbd", b"x" * 30),
    ]
)


@given(
    data=st.lists(FRAGMENTS, max_size=25).map(b"".join) | st.binary(max_size=60),
    borders=BORDERS,
    limit=st.none() | st.integers(1, 60),
)
@example(data=b"data: 1\n\n: a comment that is longer than the limit\n\n", borders=[9, 20], limit=20)
@example(data=b"data: 1\n\n" + b"x" * 60, borders=[9], limit=20)
def test_any_bytes_have_the_same_events_however_they_are_cut(
    data: bytes, borders: list[int], limit: int | None
) -> None:
    """Invalid UTF-8, all line ends and the limit included."""
    assert _decoded(_cut(data, borders), limit) == _decoded([data], limit)


# --- reading ---------------------------------------------------------------------------------------------


class _Chunks(httpx.AsyncByteStream):
    def __init__(self, chunks: Sequence[bytes]) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk


def _read(wire: Format, chunks: Sequence[bytes]) -> tuple[Any, list[tuple[str, str]]]:
    """The reply or the error of a stream, and its pieces: neighbours of one kind are one text."""
    endpoint = Endpoint(
        "p", "http://model/v1", "http://model/v1", {}, (), EnvironmentKey("KEY", None), lambda key: {}
    )
    codec = wire.codec()
    heard: list[tuple[str, str]] = []

    def hear(kind: str, text: str) -> None:
        if heard and heard[-1][0] == kind:
            text = heard.pop()[1] + text
        heard.append((kind, text))

    async def on_delta(text: str) -> None:
        hear("text", text)

    async def on_piece(piece: Delta) -> None:
        hear(f"{piece.kind} {piece.tool_call} {piece.tool_name}", piece.text)

    async def read() -> Any:
        response = httpx.Response(
            200, headers={"content-type": "text/event-stream"}, stream=_Chunks([c for c in chunks if c])
        )
        exchange = Exchange({}, on_delta, on_piece)
        body = await ReplyReading(endpoint, codec, max_bytes=100_000).body_of(response, exchange, lambda: 1.0)
        return json.dumps(codec.reply(body, provider="p").to_wire(), allow_nan=False)

    try:
        return asyncio.run(read()), heard
    except EXPECTED as error:
        return (type(error), str(error)), heard


@st.composite
def _changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes of a stream after some of them were removed, replaced or repeated."""
    for _ in range(draw(st.integers(0, 3))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.integers(0, 12)))
        put = draw(st.sampled_from([b"", data[begin:end] * 2]) | FRAGMENTS | st.binary(max_size=4))
        data = data[:begin] + put + data[end:]
    return data


@EVERY
@settings(max_examples=40)
@given(data=st.data())
def test_any_stream_is_a_reply_or_a_coded_error_however_it_is_cut(wire: Format, data: st.DataObject) -> None:
    """The same reply with the same pieces, or the same error."""
    sent = data.draw(_changed_bytes(_bytes(_events(wire.provider))))

    assert _read(wire, _cut(sent, data.draw(BORDERS))) == _read(wire, [sent])


@EVERY
def test_a_stream_that_comes_byte_by_byte_is_the_same_reply(wire: Format) -> None:
    """Each character and each line end is cut once."""
    sent = _bytes(_events(wire.provider))
    reply, heard = _read(wire, [sent])

    assert json.loads(reply)["output_text"] == TURN["text"]
    assert _read(wire, [sent[at : at + 1] for at in range(len(sent))]) == (reply, heard)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all parts of a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


@st.composite
def _changed_events(draw: st.DrawFn, events: Sequence[Event]) -> list[Event]:
    """The events of a stream after parts of them were replaced, and events repeated, removed or moved."""
    changed = list(events)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(changed) - 1))
        data, name = changed[at]
        match draw(st.sampled_from(["part", "part", "part", "repeat", "remove", "move"])):
            case "part" if data.startswith("{"):
                value = copy.deepcopy(json.loads(data))
                place = draw(st.sampled_from(_places(value)[1:]))
                holder = value
                for key in place[:-1]:
                    holder = holder[key]
                holder[place[-1]] = draw(JSON)
                changed[at] = Event(json.dumps(value), name)
            case "repeat":
                changed.insert(at, changed[at])
            case "remove" if len(changed) > 1:
                del changed[at]
            case "move":
                changed.insert(draw(st.integers(0, len(changed) - 1)), changed.pop(at))
            case _:
                pass
    return changed


@EVERY
@settings(max_examples=70)
@given(data=st.data())
def test_any_events_are_a_reply_or_a_coded_error(wire: Format, data: st.DataObject) -> None:
    """Whatever a server puts in place of a number, a text or a list."""
    _read(wire, [_bytes(data.draw(_changed_events(_events(wire.provider))))])


@EVERY
@settings(max_examples=70)
@given(data=st.data())
def test_any_body_is_a_reply_or_a_coded_error(wire: Format, data: st.DataObject) -> None:
    """A body that is not streamed, with other values in some places."""
    served, reply = _turn(wire.provider)
    body = json.loads(json.dumps(served.whole(reply)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(_places(body)[1:]))
        holder = body
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = data.draw(JSON)

    _read(wire, [json.dumps(body).encode()])


# --- what a chunk costs ----------------------------------------------------------------------------------


def _fragment(arguments: str, **more: Any) -> dict[str, Any]:
    call = {"index": 0, "id": "a", "function": {"name": "add", "arguments": arguments}, **more}
    return {"choices": [{"delta": {"tool_calls": [call]}}]}


@pytest.mark.parametrize("more", [{}, {"id": None}, {"id": None, "index": None}], ids=str)
def test_arguments_are_parsed_once_although_their_server_repeats_the_name(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """Whether they are complete is asked with each fragment that has a name."""
    parsed: list[int] = []

    def loads(text: str) -> Any:
        parsed.append(len(text))
        return json.loads(text)

    monkeypatch.setattr(openai_chat_calls, "loads", loads)
    value = {"text": '}"{\\' * 50, "more": [{"a": []}] * 50}
    text = json.dumps(value)
    reply = StreamedReply()
    for piece in text:
        reply.add(_fragment(piece, **more))
    reply.add({"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})

    (call,) = reply_from_wire(reply.body(), provider="p").tool_calls
    assert (call.name, call.arguments) == ("add", value)
    assert sum(parsed) <= len(text)


@given(value=JSON, more=st.sampled_from(["", " \n", "{}", "}", " 1"]), borders=BORDERS)
def test_arguments_are_complete_if_they_are_one_object(value: Any, more: str, borders: list[int]) -> None:
    """However they are cut, and whatever their texts contain."""
    text = json.dumps(value, ensure_ascii=False) + more
    call = StreamedCall(0, 0)
    marks = [0, *sorted(border % (len(text) + 1) for border in borders), len(text)]

    for begin, end in itertools.pairwise(marks):
        call.add_arguments(text[begin:end])
        call.is_complete  # noqa: B018 - it is asked after each piece

    assert call.is_complete == (isinstance(value, dict) and not more.strip())


def test_details_of_the_reasoning_are_joined_as_they_came() -> None:
    """Texts of one item are joined; a signature that follows belongs to it; another type is another item."""
    field = StreamedField()
    for items in (
        [{"type": "reasoning.text", "index": 0, "text": "a"}],
        [{"type": "reasoning.text", "index": 0, "text": "b"}, {"type": "reasoning.text", "index": 1}],
        [{"type": "reasoning.text", "index": 1, "text": "c", "signature": None}],
        [{"type": "reasoning.text", "index": 1, "signature": "s"}],
        [{"type": "reasoning.encrypted", "index": 1, "data": "x"}, "other"],
    ):
        field.add(items)

    assert field.whole == [
        {"type": "reasoning.text", "index": 0, "text": "ab"},
        {"type": "reasoning.text", "index": 1, "text": "c", "signature": "s"},
        {"type": "reasoning.encrypted", "index": 1, "data": "x"},
        "other",
    ]


@pytest.mark.parametrize(
    ("values", "whole"),
    [
        (["a", "b"], "ab"),
        ([{"a": 1}, {"b": 2}], {"a": 1, "b": 2}),
        (["a", ["b"], ["c"]], ["b", "c"]),
        ([["b"], "a", "c"], "ac"),
        ([1, 2], 2),
    ],
)
def test_values_of_an_opaque_field_are_joined(values: list[Any], whole: Any) -> None:
    """Texts and lists are continued, objects updated, others replaced."""
    field = StreamedField()
    for value in values:
        field.add(value)

    assert field.whole == whole
