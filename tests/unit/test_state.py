"""The overlay of a session's state: what it collects, and what it refuses to compare."""

from __future__ import annotations

from typing import Any

import pytest

from openagents_worker.errors import StepTooLarge
from openagents_worker.runtime.state import Overlay, apply_changes


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"a": 1}),
        ({"a": 1}, {}),
        ({"a": [1]}, {"a": [1, 2]}),
        ({"a": [1, 2]}, {"a": [2]}),
        ({"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": None}, {"a": [None]}),
    ],
)
def test_the_changes_lead_from_one_state_to_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    overlay = Overlay(before)
    for key in before:
        del overlay[key]
    overlay.update(after)

    apply_changes(state := dict(before), overlay.changes())

    assert state == after


def test_a_value_that_contains_itself_many_times_is_refused() -> None:
    """A pattern made it, and a tool only reads it. It has 2^60 values, so comparing it would never end."""
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    overlay = Overlay({"plan": value})
    assert overlay["plan"]

    with pytest.raises(StepTooLarge, match="'plan'"):
        overlay.changes()
