"""A published message is parsed once for all watchers of a process, and each of them gets its own event."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from openagents_worker.events import RunEvent
from openagents_worker.store.codec import PLAIN, PayloadCodec
from openagents_worker.store.published import PublishedMessage

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


class Reversing:
    name = "reversed"

    def encode(self, text: str) -> str:
        return text[::-1]

    def decode(self, text: str) -> str:
        return text[::-1]


def event(payload: dict[str, Any], seq: int | None = 7) -> RunEvent:
    return RunEvent(
        name="tool.called",
        seq=seq,
        run_id="r1",
        session_id="s1",
        agent_id="a",
        life=1,
        attempt=1,
        timestamp=datetime(2026, 1, 2, tzinfo=UTC),
        payload=payload,
    )


@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.booleans())
def test_the_event_is_the_one_that_was_published(payload: dict[str, Any], is_shared: bool) -> None:
    """It cannot be told from an event that was parsed by pydantic: fields, JSON, copies."""
    text = event(payload).to_json()
    parsed = RunEvent.from_json(text)
    message = PublishedMessage(text, is_shared=is_shared)

    for _ in range(2):
        found = message.event(PLAIN)
        assert found is not None
        assert found == parsed
        assert (found.to_json(), repr(found)) == (text, repr(parsed))
        assert found.model_fields_set == parsed.model_fields_set
        assert found.model_copy(deep=True) == copy.deepcopy(found) == parsed


@pytest.mark.parametrize("payload", [{"text": "4"}, {"params": {"list": [{"deep": 1}]}, "text": "4"}])
def test_no_receiver_sees_what_another_one_changed(payload: dict[str, Any]) -> None:
    """A program may change the payload that it has received, for example to hide a part of it."""
    message = PublishedMessage(event(payload).to_json(), is_shared=True)
    mine = message.event(PLAIN)
    assert mine is not None
    mine.payload["text"] = "changed"
    if "params" in mine.payload:
        mine.payload["params"]["list"][0]["deep"] = "changed"  # type: ignore[index,call-overload]
        mine.payload["params"]["list"].append("changed")  # type: ignore[index,call-overload,union-attr]

    other = message.event(PLAIN)

    assert other is not None
    assert other.payload == payload


def test_each_codec_reads_the_message_in_its_own_way() -> None:
    """Clients with and without a codec may share a connection. One must not get the event of the other."""
    codec = PayloadCodec(Reversing())
    envelope = json.loads(event({}).to_json())
    text = json.dumps(envelope).replace('"payload": {}', f'"payload": {codec.encode(json.dumps({"a": 1}))}')
    message = PublishedMessage(text, is_shared=True)

    for _ in range(2):
        decoded = message.event(codec)
        assert decoded is not None
        assert decoded.payload == {"a": 1}
        assert message.event(PLAIN) is None


@pytest.mark.parametrize("text", ["", "hello", "{}", "[" * 100_000, '{"name": 1}'])
def test_a_message_of_another_program_is_not_an_event(text: str) -> None:
    """Any program may publish on any channel of Redis."""
    assert PublishedMessage(text, is_shared=True).event(PLAIN) is None
