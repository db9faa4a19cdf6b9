"""A tool that returns, raises, emits and stores whatever a test says, as Python text."""

from __future__ import annotations

import math
from typing import Any

from openagents_worker import tool
from openagents_worker.tools.base import ToolContext


def nested(depth: int, inner: Any = 1) -> Any:
    """So many lists, one in the other."""
    for _ in range(depth):
        inner = [inner]
    return inner


class Anything(Exception):
    """Its text is the test's."""


NAMES = {"nested": nested, "math": math, "Anything": Anything, "nan": math.nan, "inf": math.inf}


@tool
async def give(what: str, value: str, context: ToolContext, name: str = "x") -> Any:
    """Evaluates `value` and passes it on.

    Args:
        what: returns, raises, emits, state or artifact.
        value: A Python expression.
        name: Of the event, of the key in the state, of the artifact.
    """
    given = eval(value, dict(NAMES))  # noqa: S307 - the text is the test's own
    match what:
        case "returns":
            return given
        case "raises":
            raise given
        case "emits":
            await context.emit(name, **given)
        case "state":
            context.state[name] = given
        case "artifact":
            context.add_artifact(name, kind="json", payload=given)
        case _:
            raise ValueError(f"what is {what!r}")
    return "done"
