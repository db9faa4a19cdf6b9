"""A tool that returns, raises, emits and stores the value of a Python expression from a test."""

from __future__ import annotations

import math
from typing import Any

from openagents_worker import tool
from openagents_worker.tools.base import ToolContext


def nested(depth: int, inner: Any = 1) -> Any:
    """This number of lists, one inside the other."""
    for _ in range(depth):
        inner = [inner]
    return inner


def doubled(levels: int, inner: Any = 1) -> Any:
    """A list that contains the next one twice: few objects, but 2 to the power of `levels` values."""
    for _ in range(levels):
        inner = [inner, inner]
    return inner


def explodes(base: type, error: BaseException) -> Any:
    """A value of a class whose every method raises this exception."""

    def method(self: Any, *given: Any, **named: Any) -> Any:
        raise error

    names = (
        "__str__", "__repr__", "__iter__", "__len__", "__eq__", "__bool__", "__contains__", "__getitem__",
        "__format__", "__index__", "__float__", "__reduce_ex__", "__copy__", "__deepcopy__", "keys", "items",
        "values", "get", "encode", "isascii", "model_dump", "__next__", "__enter__",
    )  # fmt: skip
    made: Any = type("Explodes", (base,), {"__hash__": object.__hash__, **dict.fromkeys(names, method)})
    return made.__new__(made)


class Anything(Exception):
    """An object whose text the test chooses."""


NAMES = {
    "nested": nested,
    "doubled": doubled,
    "math": math,
    "Anything": Anything,
    "nan": math.nan,
    "inf": math.inf,
}


@tool
async def give(what: str, value: str, context: ToolContext, name: str = "x") -> Any:
    """Evaluates `value` and passes it on.

    Args:
        what: returns, raises, emits, emits each, state, states or artifact.
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
        case "emits each":
            for one in given:
                await context.emit(name, x=one)
        case "state":
            context.state[name] = given
        case "states":
            context.state.update(given)
        case "artifact":
            context.add_artifact(name, kind="json", payload=given)
        case _:
            raise ValueError(f"what is {what!r}")
    return "done"
