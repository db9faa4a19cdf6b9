"""Events: all declared in one place, checked against it, and the same after a journey as JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from openagents_worker.events import EVENT_SCHEMAS, LIVE_ONLY_EVENTS, TERMINAL_EVENTS, RunEvent, check_event

EVENT = RunEvent(
    name="tool.called", seq=3, run_id="r", session_id="s", agent_id="a", life=1, attempt=2, worker="w",
    timestamp=datetime(2026, 1, 2, 3, 4, 5, 678000, UTC), payload={"tool_id": "calc", "params": {"x": 1}},
)  # fmt: skip


def test_an_event_survives_its_journey() -> None:
    """A watcher reads the written event, from bytes or text."""
    assert RunEvent.from_json(EVENT.to_json()) == EVENT
    assert RunEvent.from_json(EVENT.to_json().encode()) == EVENT


@pytest.mark.defect("E01")
def test_the_envelope_has_the_documented_keys_and_final_only_when_true() -> None:
    """Other languages read it, so its keys are part of the interface."""
    keys = [
        "name",
        "seq",
        "run_id",
        "session_id",
        "agent_id",
        "life",
        "attempt",
        "worker",
        "timestamp",
        "payload",
    ]
    assert list(json.loads(EVENT.to_json())) == keys
    assert list(json.loads(EVENT.model_copy(update={"final": True}).to_json())) == [*keys, "final"]


def test_a_live_event_has_no_number() -> None:
    """`seq: null` means that the event is not stored and not replayed."""
    live = EVENT.model_copy(update={"seq": None})
    assert json.loads(live.to_json())["seq"] is None
    assert RunEvent.from_json(live.to_json()).seq is None


def test_an_envelope_of_a_newer_writer_is_read() -> None:
    """During an upgrade both versions watch the same runs."""
    newer = json.loads(EVENT.to_json()) | {"tenant": "t1"}
    assert RunEvent.from_json(json.dumps(newer)) == EVENT


def test_what_is_no_event_is_an_error() -> None:
    """An event without its run cannot be shown."""
    with pytest.raises(ValidationError):
        RunEvent.from_json('{"name": "tool.called", "seq": 0}')


def test_a_payload_must_have_what_is_declared() -> None:
    """Each missing key is one problem; further keys are fine."""
    assert check_event("tool.succeeded", {"tool_id": "calc", "result": 1, "more": True}) == []
    assert check_event("tool.failed", {}) == [
        "tool.failed: 'tool_id' is missing",
        "tool.failed: 'error' is missing",
    ]


def test_a_misspelt_name_is_a_problem_and_an_applications_own_is_not() -> None:
    """Our families of names are closed; `order.shipped` belongs to an application."""
    assert check_event("tool.caled", {}) == ["tool.caled: not declared; did you mean 'tool.called'?"]
    assert check_event("order.shipped", {}) == []


def test_terminal_and_live_events_are_declared() -> None:
    """One of three ends a life; deltas and gaps are never stored."""
    assert len(TERMINAL_EVENTS) == 3
    assert set(EVENT_SCHEMAS).issuperset(TERMINAL_EVENTS | LIVE_ONLY_EVENTS)
    assert EVENT.model_copy(update={"name": "run.failed"}).is_terminal
    assert not EVENT.is_terminal


def test_every_event_says_what_it_means() -> None:
    """The reference page is made from the declarations."""
    for name, schema in EVENT_SCHEMAS.items():
        assert schema.name == name
        assert schema.description
        assert not set(schema.required) & set(schema.optional)
