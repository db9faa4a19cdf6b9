"""Places in a JSON Schema. The only place that reads JSON pointers, and says where a problem is."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["MISSING", "SchemaProblem", "at_pointer", "canonical", "escaped", "kind", "problem"]

MISSING: Any = object()
_INDEX = re.compile("[0-9]{1,9}")


class SchemaProblem(ValueError):
    """A JSON Schema is not accepted; the text says where in it, what is wrong, and what would be right."""


def at_pointer(root: Any, pointer: str) -> Any:
    """What stands at a JSON pointer, `MISSING` where nothing does."""
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
    return "".join(f"/{escaped(name)}" for name in _names(pointer))


def escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def kind(value: Any) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "a text", bool: "a boolean"}.get(type(value), "a number")


def problem(place: str, text: str) -> SchemaProblem:
    shown = ".".join(_names(place))
    where = shown if len(shown) <= 200 else f"{shown[:200]}…"
    return SchemaProblem(f"{where}: {text}" if where else text)
