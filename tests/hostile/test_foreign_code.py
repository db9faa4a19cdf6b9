"""Code injection: names of modules and classes in input. None is imported or called.

`tests/access/test_imports.py` checks the worker's imports; these tests check the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.access.test_imports import MESSAGES, NAME, TYPED
from tests.hostile.matrix import CODE
from tests.hostile.table import Attack, Case, cases, hostile

Envelope = dict[str, Any]
ANSWERED = ("completed", "request.invalid", "user.agent_not_found", "plugin.load", "gone")
"""A run with a harmless name may complete. A message that belongs to no task is dropped."""


def instead(message: Mapping[str, Any]) -> Callable[[Envelope], Envelope]:
    """Replace a valid message with this one, under the same delivery tag."""

    def changed(envelope: Envelope) -> Envelope:
        properties = {**envelope["properties"], "body_encoding": message["properties"]["body_encoding"]}
        return {**message, "properties": properties}

    return changed


FIELDS = (
    "agent_id", "session_id", "input_text", "deps", "output_type", "queue", "tenant", "labels", "impl",
    "tools", "llm", "pattern", "memory", "context_hints", "on_busy",
    "parent_run_id", "resume_from_checkpoint",
)  # fmt: skip
VALUES = {"a name": NAME, "a reference": {"impl": NAME}, "a typed value": TYPED}
REFUSED = (*ANSWERED, "config.error", "run.not_found", "request.too_large")

CASES = [
    *cases("message", {name: (instead(message), ANSWERED) for name, message in MESSAGES.items()}),
    *cases(
        "request",
        {
            f"{field} is {name}": ({field: value}, REFUSED)
            for number, field in enumerate(FIELDS)
            for name, value in [*VALUES.items(), *VALUES.items()][number % 3 :][:2]
            if (field, name) != ("queue", "a name")  # no worker consumes a queue with that name
        },
    ),
]


@hostile(CODE, CASES)
def test_no_name_becomes_code(case: Case, attack: Attack) -> None:
    attack(case)
