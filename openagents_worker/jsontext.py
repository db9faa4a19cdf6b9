"""JSON text. The only place that says which values may be stored, how they are written and how read.

Whoever writes must write what every reader reads: Python's decoder, pydantic (200 levels), cjson in Redis.

| | from a producer, the options, the agents file | from a tool, a model, an exception, a plugin |
|---|---|---|
| half of a surrogate pair in a text | refused | U+FFFD stands in its place |
| an integer beyond -2^63 … 2^63-1 | refused | its digits stand there as text |
| NaN, Infinity, a number that overflows (`1e999`) | refused | null stands there |
| more than 100 levels of lists and objects | refused | the step fails, `step.too_deep` |
| a key that is not text | refused | its JSON is the key: `1`, `true`, `null` |
| what is not JSON: an object, bytes, a circle | refused | the step fails, `step.too_large` |

`check` refuses, `replaced` replaces. What an older version has stored may break a rule, and is read all the
same: `loads` asks for JSON only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

__all__ = [
    "ENVELOPE_LEVELS",
    "LARGEST_COUNT",
    "LARGEST_INTEGER",
    "MAX_NESTING",
    "MAX_VALUES",
    "NESTING_OF_OLD",
    "SMALLEST_INTEGER",
    "BadValue",
    "NestedTooDeeply",
    "canonical_json",
    "check",
    "dumps",
    "is_whole",
    "loads",
    "replaced",
    "size_of",
    "whole_text",
]

MAX_NESTING = 100
"""Levels of lists and objects in a value that is stored; pydantic, the first to give up, reads 200."""
ENVELOPE_LEVELS = 10
"""Levels that this library itself puts around a value: a reply's `tool_calls[0].arguments` are three."""
NESTING_OF_OLD = 150
"""Levels that earlier versions have stored."""
MAX_VALUES = 2_000_000
"""In one value that is stored: a list that stands in it again and again counts each time, as in its text."""
LARGEST_INTEGER = 2**63 - 1
SMALLEST_INTEGER = -(2**63)
"""What a reader in any language keeps exactly: 64 bits with a sign."""
LARGEST_COUNT = 2**53
"""Up to here also those readers count exactly whose numbers are all floats."""
MAX_PATH_CHARS = 200

_HALF = "half of a surrogate pair (U+D800 to U+DFFF), which is not a character"
_BEYOND = "an integer beyond 64 bits; -2^63 to 2^63-1 are allowed, send a larger one as text"
_NOT_FINITE = "NaN or infinite, which JSON has no number for; leave it out or send null"
_TOO_DEEP = f"nested more than {MAX_NESTING} levels deep; send a flatter value, or its JSON as text"

_TOO_MANY = f"it has more than {MAX_VALUES:,} values"


class BadValue(ValueError):
    """A value breaks a rule. `path` says where: `labels.x[3]`, empty for the value itself."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: it is {problem}" if path else f"it is {problem}")
        self.path, self.problem = path, problem


class NestedTooDeeply(ValueError):
    """A value that was to be stored has too many levels."""


# --- writing ---------------------------------------------------------------------------------------------


def dumps(value: Any) -> str:
    """Compact JSON. Raises TypeError or ValueError for what is not JSON, NaN included."""
    return _encoded(value)


def canonical_json(value: Any) -> str:
    """Compact JSON with its keys in order: equal values have equal texts. Raises as `dumps` does."""
    return _encoded_in_order(value)


def size_of(value: Any) -> int:
    """The value's size in bytes as JSON. Raises as `dumps` does."""
    return len(_encoded(value).encode())


_encoded = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_encoded_in_order = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, sort_keys=True
).encode


# --- reading ---------------------------------------------------------------------------------------------


def loads(text: str | bytes, *, nan_is_null: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError for whatever cannot be read, also for endless nesting.

    NaN and Infinity are not JSON; with `nan_is_null` they count as null, as some servers send them.

    >>> loads('[NaN]', nan_is_null=True)
    [None]
    """
    decode = _decode_loosely if nan_is_null else _decode
    try:
        return decode(text if isinstance(text, str) else str(text, "utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply to be read") from None


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_decode = json.JSONDecoder(parse_constant=_not_json).decode
_decode_loosely = json.JSONDecoder(parse_constant=lambda _: None).decode


# --- text ------------------------------------------------------------------------------------------------


def is_whole(text: str) -> bool:
    """Whether a text holds whole characters only, so that it can be sent and stored."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_text(text: str) -> str:
    r"""The text with pairs of surrogates joined, and U+FFFD in the place of half a pair (JSON's "\ud83d").

    >>> whole_text("\ud83d\ude00"), whole_text("a\ud800") == "a\ufffd"
    ('😀', True)
    """
    return (
        text if is_whole(text) else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    )


# --- refusing --------------------------------------------------------------------------------------------


def check(value: Any, path: str = "") -> None:
    """Raises `BadValue` for the first part of a value that breaks a rule of text, numbers or depth.

    What is not JSON is left to those who know what should be there.

    >>> check({"x": [1, 2, 2**63]}, "labels")
    Traceback (most recent call last):
    openagents_worker.jsontext.BadValue: labels.x[2]: it is an integer beyond 64 bits; -2^63 to 2^63-1 are ...
    """
    found = _problem(value, MAX_NESTING)
    if found is not None:
        steps, problem = found
        raise BadValue(_path(path, steps), problem)


def _problem(value: Any, levels: int) -> tuple[list[str | int], str] | None:
    """Where in the value, from the inside out, and what."""
    if isinstance(value, str):
        return None if is_whole(value) else ([], _HALF)
    if isinstance(value, int):
        return None if SMALLEST_INTEGER <= value <= LARGEST_INTEGER else ([], _BEYOND)
    if isinstance(value, float):
        return None if math.isfinite(value) else ([], _NOT_FINITE)
    if isinstance(value, Mapping):
        inner: Any = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    else:
        return None
    if levels == 0:
        return [], _TOO_DEEP
    for step, item in inner:
        if isinstance(step, str) and not is_whole(step):
            return [whole_text(step)], f"under a name with {_HALF}"
        found = _problem(item, levels - 1)
        if found is not None:
            found[0].append(step if isinstance(step, str | int) else str(step))
            return found
    return None


def _path(begin: str, steps: list[str | int]) -> str:
    text = begin
    for step in reversed(steps):
        if isinstance(step, int) and SMALLEST_INTEGER <= step <= LARGEST_INTEGER:
            text += f"[{step}]"
        else:
            text += f".{step}" if text else str(step)
        if len(text) > MAX_PATH_CHARS:
            return f"{text[:MAX_PATH_CHARS]}…"
    return text


# --- replacing -------------------------------------------------------------------------------------------


def replaced(value: Any, levels: int = MAX_NESTING) -> Any:
    """The value as it will be read back: the same object where that makes no difference.

    Raises `NestedTooDeeply` for more than so many levels, TypeError or ValueError for what is not JSON, and
    ValueError for more than `MAX_VALUES` values.

    >>> replaced({1: (float("nan"), 2**64)})
    {'1': [None, '18446744073709551616']}
    """
    left = [MAX_VALUES]
    return value if _is_as_read(value, levels, left) else _replaced(value, levels, (), [MAX_VALUES])


def _is_as_read(value: Any, levels: int, left: list[int]) -> bool:
    """Whether reading what is written of the value gives the same. It runs for every commit: no call that
    can be left out."""
    kind = type(value)
    if kind is dict:
        left[0] -= len(value)
        if left[0] < 0:
            raise ValueError(_TOO_MANY)
        if levels == 0:
            return False
        for key, item in value.items():
            if type(key) is not str or not (key.isascii() or is_whole(key)):
                return False
            kind = type(item)
            if kind is str:
                if not (item.isascii() or is_whole(item)):
                    return False
            elif kind is int:
                if not SMALLEST_INTEGER <= item <= LARGEST_INTEGER:
                    return False
            elif item is not None and kind is not bool and not _is_as_read(item, levels - 1, left):
                return False
        return True
    if kind is list:
        left[0] -= len(value)
        if left[0] < 0:
            raise ValueError(_TOO_MANY)
        if levels == 0:
            return False
        for item in value:
            kind = type(item)
            if kind is str:
                if not (item.isascii() or is_whole(item)):
                    return False
            elif kind is int:
                if not SMALLEST_INTEGER <= item <= LARGEST_INTEGER:
                    return False
            elif item is not None and kind is not bool and not _is_as_read(item, levels - 1, left):
                return False
        return True
    if kind is str:
        return is_whole(value)
    if kind is int:
        return bool(SMALLEST_INTEGER <= value <= LARGEST_INTEGER)
    if kind is float:
        return math.isfinite(value)
    return value is None or kind is bool


def _replaced(value: Any, levels: int, outer: tuple[int, ...], left: list[int]) -> Any:
    """A copy; `outer` are the identities of what it stands in."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return whole_text(str.__str__(value))
    if isinstance(value, int):
        number = int.__index__(value)
        return number if SMALLEST_INTEGER <= number <= LARGEST_INTEGER else _digits(number)
    if isinstance(value, float):
        return float.__float__(value) if math.isfinite(value) else None
    if not isinstance(value, dict | list | tuple):
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    if id(value) in outer:
        raise ValueError("Circular reference detected")
    if len(outer) >= levels:
        raise NestedTooDeeply(f"it is nested more than {levels} levels deep")
    left[0] -= len(value)
    if left[0] < 0:
        raise ValueError(_TOO_MANY)
    outer = (*outer, id(value))
    if isinstance(value, dict):
        return {_key(key): _replaced(item, levels, outer, left) for key, item in value.items()}
    return [_replaced(item, levels, outer, left) for item in value]


def _key(key: Any) -> str:
    """A key as JSON writes it."""
    if isinstance(key, str):
        return whole_text(str.__str__(key))
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    if isinstance(key, int):
        return _digits(int.__index__(key))
    if isinstance(key, float):
        return float.__repr__(key)
    raise TypeError(f"keys must be str, int, float, bool or None, not {type(key).__name__}")


def _digits(number: int) -> str:
    """An integer as text, in hexadecimal where Python writes no decimal: `int(text, 0)` reads both."""
    try:
        return str(number)
    except ValueError:  # Python writes 4,300 digits: the time grows with their square
        return hex(number)
