"""The codec: what users and models wrote is encoded on its way to Redis, and nothing else knows of it."""

from __future__ import annotations

import itertools
import json
import marshal
import re
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import openagents_worker.store.event_items as event_items_module
from openagents_worker.errors import RecordUnreadable
from openagents_worker.jsontext import dumps
from openagents_worker.store.cell import Cell
from openagents_worker.store.checkpoints import checkpoints
from openagents_worker.store.codec import MARK, PLAIN, PayloadCodec, digest_of
from openagents_worker.store.event_items import CALL_FIELDS, event_items
from openagents_worker.store.records import parse_request
from openagents_worker.store.watch import watch
from tests.store.test_scripts import Bench
from tests.support.script_calls import call


class Reversing:
    """Stores texts backwards, and never twice the same, as encryption does."""

    def __init__(self, name: str = "reversed") -> None:
        self.name = name
        self._numbers = itertools.count()

    def encode(self, text: str) -> str:
        return f"{next(self._numbers)} {text[::-1]}"

    def decode(self, text: str) -> str:
        return text.partition(" ")[2][::-1]


REVERSED = PayloadCodec(Reversing())


@pytest.fixture
def bench(redis_url: str) -> Generator[Bench]:
    """A bench whose store encodes."""
    with Bench(redis_url, codec=REVERSED) as bench:
        yield bench


# --- texts -----------------------------------------------------------------------------------------------


@given(st.text())
def test_a_text_is_read_as_it_was_written(text: str) -> None:
    assert REVERSED.decode(REVERSED.encode(text)) == text
    assert PLAIN.decode(PLAIN.encode(text)) == text


@given(st.text(min_size=1))
def test_an_encoded_text_is_a_json_string_that_is_no_text_of_ours(text: str) -> None:
    """A script puts it into the JSON of an event."""
    encoded = REVERSED.encode(text)
    assert isinstance(json.loads(encoded), str)
    assert encoded.startswith(MARK)
    assert not dumps(json.loads(encoded)).startswith(MARK)


@given(st.lists(st.text(min_size=1), min_size=1))
def test_texts_that_a_script_has_joined_are_read_as_one(pieces: list[str]) -> None:
    """Also if some of them were written before there was a codec, or look like encoded ones."""
    assert REVERSED.decode_pieces("".join(map(REVERSED.encode, pieces))) == "".join(pieces)
    assert PLAIN.decode_pieces("".join(pieces)) == "".join(pieces)
    assert REVERSED.decode_pieces(MARK) == MARK


def test_plain_texts_are_read_by_every_codec() -> None:
    """Texts of scripts, and those from before there was a codec."""
    assert REVERSED.decode('{"a":1}') == '{"a":1}'
    assert REVERSED.encode("") == ""


def test_several_codecs_are_read_and_one_is_written() -> None:
    """So the encoding of a cell can be changed while its workers run."""
    old, new = Reversing("old"), Reversing("new")
    both = PayloadCodec(new, also_reads=[old])
    assert both.decode(PayloadCodec(old).encode("x")) == "x"
    assert both.encode("x") == f'{MARK}new:0 x"'
    assert PayloadCodec(also_reads=[new]).encode("x") == "x"


def test_a_text_of_an_unknown_codec_is_an_unreadable_record() -> None:
    """The process does not fail; the run does, with a code that says why."""
    stored = PayloadCodec(Reversing("other")).encode('{"agent_id":"a"}')
    assert REVERSED.decode(stored) == stored
    with pytest.raises(RecordUnreadable):
        parse_request("r1", REVERSED.decode(stored))


def test_a_published_event_is_read_whole() -> None:
    for payload in ({"a": "b"}, {"text": "u006fa: is no mark", "call": 1}):
        encoded = f'{{"name":"x","payload":{REVERSED.encode(dumps(payload))}}}'
        assert json.loads(REVERSED.decode_event(encoded))["payload"] == payload
        plain = dumps({"name": "x", "payload": payload})
        assert json.loads(REVERSED.decode_event(plain))["payload"] == payload
    assert REVERSED.decode_event('{"u006fa:') == '{"u006fa:'


def test_a_digest_says_only_whether_texts_are_equal() -> None:
    assert digest_of("hi") == digest_of("hi") != digest_of("ho")
    assert digest_of("") == ""


@pytest.mark.parametrize(
    "payload",
    ["{", "[]", "1", "{}", '{"call":1,"offset":0,"text":"x"}', '{"call":"c","offset":true,"text":"x"}',
     '{"call":"c","offset":-1,"text":"x"}', '{"call":"c","offset":9e99,"text":"x"}',
     '{"call":"c","offset":0,"text":""}'],
)  # fmt: skip
def test_an_event_of_user_code_with_the_name_of_a_piece_is_an_event_like_others(payload: str) -> None:
    assert event_items(["llm.delta", payload], PLAIN) == ["llm.delta", payload]


def test_a_piece_that_is_not_parsed_is_the_same_as_a_parsed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fields, numbers and texts it has, and if it is not quite the JSON that this library writes."""
    more = ({}, {"kind": "text"}, {"kind": "reasoning"}, {"text": "another"})
    payloads = [
        dumps({field: call, "attempt": 1, "offset": offset, "text": text, **others}).replace(*changed)
        for field, call, offset, text, others, changed in itertools.product(
            ("call", "call_id"),
            ("m:1", "", 'a"b', "ü\\"),
            (0, 12, 2**53, 2**53 + 1, 10**20, -1),
            ("yy", "", "é\n", "😀\x7f"),
            more,
            ((":0", ":007"), ("yy", "\x01"), ('"}', '"} '), ("}", ""), ("yy", "yy")),
        )
    ]
    events = [part for payload in payloads for name in CALL_FIELDS for part in (name, payload)]

    as_written = event_items(events, PLAIN)

    monkeypatch.setattr(
        event_items_module, "_PIECE_AS_WRITTEN", dict.fromkeys(CALL_FIELDS, re.compile("(?!)"))
    )
    assert as_written == event_items(events, PLAIN)
    assert len({name for name in as_written[::2] if name[0] == "\x1f"}) > len(more)


def test_a_name_cannot_claim_to_be_of_the_library() -> None:
    assert event_items(["\x1fllm.failed\x1fm:1", "{}"], PLAIN) == ["llm.failed\x1fm:1", "{}"]


# --- scripts ---------------------------------------------------------------------------------------------

WORD = "Lindwurm"


def stored(bench: Bench) -> str:
    """Everything that Redis holds, as one text."""
    return repr(bench.lab.read())


def test_scripts_read_no_payload(bench: Bench) -> None:
    """A run from its start to its end, with everything that a payload can be."""
    worded: dict[str, Any] = {"text": WORD}
    payload = dumps(worded)
    bench.do("submit", request=payload, input_text=WORD)
    claimed = bench.do("claim", run_id="r1", nonce="n")
    assert claimed.request == payload
    events = ["tool.called", payload, "llm.delta", dumps({"call": "m:1", "offset": 0, "text": WORD})]
    bench.do("emit", fence=claimed.fence, events=events)
    commit = call("commit", fence=claimed.fence, records=[payload], batch_no=2, events=["note", payload])
    assert [bench.lab.run(commit) for _ in range(2)] == ["OK", "OK"]
    retry = {"call": "m:1", "error_details": payload, "events": ["note", payload], "batch_no": 3}
    bench.do("suspend", fence=claimed.fence, delay_ms=1, **retry)
    bench.lab.make_due("r1")
    bench.do("wake")
    again = bench.do("claim", run_id="r1", nonce="m")
    assert (again.request, again.journal) == (payload, (payload,))
    assert bench.do("page") == (payload,)
    assert WORD not in stored(bench)
    bench.do(
        "finish",
        fence=again.fence,
        result=payload,
        payload=payload,
        transcript=[payload],
        artifacts=[payload],
        state=["key", payload],
        events=["llm.succeeded", dumps({"call": "m:1", "text": WORD})],
    )

    assert WORD not in stored(bench)
    assert WORD[::-1] in stored(bench)
    with closing(watch(bench.store, "r1")) as found:
        payloads = {event.name: event.payload for event in found}
    assert payloads["tool.called"] == payloads["note"] == payloads["run.completed"] == worded
    assert payloads["llm.succeeded"]["text"] == WORD
    bench.do("submit", run_id="r2")
    assert bench.do("claim", run_id="r2", nonce="n").session_state == {"key": payload}


def test_who_joins_during_a_reply_gets_its_text(bench: Bench) -> None:
    """The script joins the pieces without reading them, and counts their characters."""
    fence = bench.claimed()
    thought = dumps({"call": "m:1", "offset": 0, "text": WORD, "kind": "reasoning"})
    bench.do("emit", fence=fence, batch_no=0, events=["llm.delta", thought])
    long = "東" * 3_000  # more than one part of the kept text
    pieces = [(0, "Grüße "), (6, "aus 東京 "), (13, "🗼"), (14, long), (3_014, long), (6_014, "!")]
    for number, (offset, text) in enumerate(pieces, start=1):
        piece = dumps({"call": "m:1", "offset": offset, "text": text})
        bench.do("emit", fence=fence, batch_no=number, events=["llm.delta", piece])
    with closing(watch(bench.store, "r1")) as events:
        (delta,) = [next(events) for _ in range(3)][2:]
        text = "".join(text for _, text in pieces)
        joined = {"call": "m:1", "attempt": 1, "offset": 0, "text": text, "kind": "text"}
        assert delta.payload == joined
        piece = dumps({"call": "m:1", "attempt": 1, "offset": 6_015, "text": "!", "kind": "text"})
        bench.do("emit", fence=fence, batch_no=7, events=["llm.delta", piece, "note", '{"a":1}'])
        assert [next(events).payload for _ in range(2)] == [json.loads(piece), {"a": 1}]
    assert "Grüße" not in stored(bench)
    assert WORD not in stored(bench)


@pytest.mark.parametrize(("asked", "answer"), [("hello", "OK"), ("hi", "OTHER_INPUT"), ("", "OK")])
def test_the_input_of_a_resumed_run_is_compared_by_its_digest(bench: Bench, asked: str, answer: str) -> None:
    bench.do("submit", input_text="hello", request=dumps({"input_text": "hello"}))
    bench.do("cancel")
    assert bench.do("resume", input_text=asked).answer == answer


@pytest.mark.parametrize(("asked", "answer"), [("grüß dich", "OK"), ("hi", "OTHER_INPUT")])
def test_a_run_of_the_previous_version_has_no_digest(bench: Bench, asked: str, answer: str) -> None:
    """Its request is plain JSON."""
    bench.do("submit", request="{}")
    bench.redis.hdel(bench.store.keys("run", "r1"), "input_digest")
    bench.redis.hset(bench.store.keys("run", "r1"), "request", dumps({"input_text": "grüß dich"}))
    bench.do("cancel")
    assert bench.do("resume", input_text=asked).answer == answer


def test_checkpoints_are_decoded(bench: Bench) -> None:
    record = {"call": "t:1", "kind": "tool", "name": "t", "outcome": {"ok": WORD}, "v": 1}
    request = dumps({"agent_id": "a", "session_id": "s1", "input_text": WORD})
    bench.do("commit", fence=bench.claimed(request=request), records=[dumps(record)])
    assert [checkpoint.value for checkpoint in checkpoints(bench.store, "r1")] == [WORD]


def test_a_cell_without_its_codec_can_be_sent_to_another_process() -> None:
    """The stall monitor is such a process: it records a run and reads no payloads."""
    cell = Cell("redis://localhost:6379/0", prefix="mine", codec=REVERSED)
    sent = marshal.loads(marshal.dumps(cell.without_codec()))  # noqa: S302 - its own text
    assert Cell(**sent) == replace(cell, codec=PLAIN)
