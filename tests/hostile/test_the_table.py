"""The entry points themselves: valid input passes each of them, so a rejection is caused by the input."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.entry_points import ENTRY_POINTS
from tests.hostile.matrix import missing
from tests.hostile.table import TRIED, Attack, Case, cases, hostile

REPLY = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}
CHUNK = {"choices": [{"delta": {"content": "fine"}, "finish_reason": "stop"}]}

MESSAGE = {"type": "message", "content": [{"type": "text", "text": "fine"}], "stop_reason": "end_turn"}
RESPONSE = {
    "object": "response",
    "id": "r",
    "status": "completed",
    "output": [{"type": "message", "content": [{"type": "output_text", "text": "fine"}]}],
}

GOOD_INPUT = [
    *cases("request", {"a label": ({"labels": {"team": "blue"}}, "completed")}),
    *cases("options", {"a task id": ({"headers": {"x": "y"}}, "completed")}),
    *cases(
        "message",
        {
            "from outside": (lambda envelope: None, "completed"),
            "not JSON": (b"{", "gone"),
            "another agent": (
                lambda envelope: {**envelope, "body": envelope["body"].replace("clerk", "clrk")},
                "user.agent_not_found",
            ),
        },
    ),
    *cases("record", {"unchanged": (lambda redis, keys, run_id: None, "completed")}),
    *cases("agents_file", {"a tool": ({"tools": [{"id": "calc", "type": "calc"}]}, "loaded")}),
    *cases("reply", {"a text": (json.dumps(REPLY).encode(), "completed")}),
    *cases("stream", {"a text": (f"data: {json.dumps(CHUNK)}\n\ndata: [DONE]\n\n".encode(), "completed")}),
    *cases("anthropic_reply", {"a text": ([MESSAGE], "completed")}),
    *cases("responses_reply", {"a text": ([RESPONSE], "completed")}),
    *cases("answer", {"a number": (({"type": "integer"}, 7), "completed")}),
    *cases("arguments", {"a sum": (("calc", {"expression": "1+1"}), "completed")}),
    *cases("tool_result", {"a list": ("[1, 2]", "completed")}),
    *cases("mcp", {"a text": (("", b""), "completed")}),
    *cases("tool_error", {"of its own": ("Anything('why')", "tool.error")}),
    *cases("event", {"a number": ("{'n': 1}", "completed")}),
    *cases("state", {"a number": ("1", "completed")}),
    *cases("artifact", {"a number": ("1", "completed")}),
    *cases("url", {"an unknown scheme": ("gopher://example.org", "tool.validation")}),
    *cases("header", {"a request id": ({"x-request-id": "r"}, "completed")}),
    *cases("last_event_id", {"seven": ("7", "completed")}),
    *cases("cli", {"runs": (["runs", "--json"], "exit 0")}),
    *cases("page", {"workers": ("/workers", "200")}),
]


@hostile("none", GOOD_INPUT)
def test_good_input_passes(case: Case, attack: Attack) -> None:
    attack(case)


def test_each_entry_point_is_tried() -> None:
    assert {case.entry_point for case in GOOD_INPUT} == set(ENTRY_POINTS)


def test_each_kind_comes_through_each_possible_entry_point() -> None:
    """At least twenty inputs each. For every other combination the matrix says why it is impossible."""
    assert len(list(all_marks())) > 10

    assert list(missing(TRIED)) == []


def test_no_input_is_left_to_the_slow_tests() -> None:
    """`make test` and `make test-long` try all of them, and so does `make hostile`."""
    slow = [
        name
        for name, marks in all_marks()
        for mark in marks
        if mark.name == "slow"
        or (
            mark.name == "parametrize"
            and any(one.name == "slow" for case in mark.args[1] for one in case.marks)
        )
    ]

    assert slow == []


def all_marks() -> Iterator[tuple[str, list[pytest.Mark]]]:
    """Each test of hostile inputs, with its marks."""
    for file in Path(__file__).parent.glob("test_*.py"):
        module = importlib.import_module(f"tests.hostile.{file.stem}")
        for name, value in vars(module).items():
            marks: list[pytest.Mark] = getattr(value, "pytestmark", []) if callable(value) else []
            if any(mark.name == "hostile" for mark in marks):
                yield f"{file.stem}.{name}", marks
