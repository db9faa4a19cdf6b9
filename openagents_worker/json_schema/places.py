"""Places in a JSON Schema: the only place that reads JSON pointers (RFC 6901) and formats them for errors."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["MISSING", "SchemaProblem", "at_pointer", "canonical", "escaped", "kind_of", "problem_at"]

MISSING: Any = object()
_INDEX = re.compile("[0-9]{1,9}")


class SchemaProblem(ValueError):
    """A JSON Schema is not accepted. The text says where and why, and what would be valid."""


def at_pointer(root: Any, pointer: str) -> Any:
    """The value at a JSON pointer; `MISSING` if there is none."""
    found = root
    for name in _names(pointer):
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and _INDEX.fullmatch(name) and int(name) < len(found):
            found = found[int(name)]
        else:
            return MISSING
    return found


def _names(pointer: str) -> list[str]:
    return [name.replace("~1", "/").replace("~0", "~") for name in pointer.split("/")[1:]]


def canonical(pointer: str) -> str:
    """The pointer with uniform escapes, so that equal places have equal pointers."""
    return "".join(f"/{escaped(name)}" for name in _names(pointer))


def escaped(name: str) -> str:
    """The name as a part of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def kind_of(value: Any) -> str:
    """The JSON type of a value, for an error text."""
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}.get(type(value), "a number")


def problem_at(place: str, text: str) -> SchemaProblem:
    """A `SchemaProblem` whose text begins with the place, a JSON pointer."""
    shown = ".".join(_names(place))
    where = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return SchemaProblem(f"{where}: {text}" if where else text)
