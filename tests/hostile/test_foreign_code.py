"""Foreign code: names of modules and classes where a library might look for one. None is imported or called.

`tests/access/test_imports.py` looks into the worker whether one was; here each is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.access.test_imports import MESSAGES, NAME, TYPED
from tests.hostile.matrix import CODE
from tests.hostile.table import Attack, Case, cases, hostile

Envelope = dict[str, Any]
ANSWERED = ("completed", "request.invalid", "user.agent_not_found", "plugin.load", "gone")
"""A run with a harmless name in it may complete; a message that is no task's is dropped."""


def instead(message: Mapping[str, Any]) -> Callable[[Envelope], Envelope]:
    """Puts this message in the place of a good one, under the good one's tag."""

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
            if (field, name) != ("queue", "a name")  # a queue of that name is served by nobody: the run waits
        },
    ),
]


@hostile(CODE, CASES)
def test_no_name_becomes_code(case: Case, attack: Attack) -> None:
    attack(case)
