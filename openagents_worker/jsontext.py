"""JSON text. The only place that defines which values can be stored, and how they are written and read.

Every written text must be readable by Python's decoder, by pydantic (200 levels) and by cjson in Redis.

| | from a producer, options, the agents file | from a tool, a model, an exception, a plugin |
|---|---|---|
| half of a surrogate pair in a text | rejected | replaced by U+FFFD |
| an integer beyond -2^63 … 2^63-1 | rejected | replaced by its digits as text |
| NaN, Infinity, a number that overflows (`1e999`) | rejected | replaced by null |
| more than 100 levels of lists and objects | rejected | the step fails, `step.too_deep` |
| a key that is not text | rejected | replaced by its JSON: `1`, `true`, `null` |
| what is not JSON: an object, bytes, a circular reference | rejected | the step fails, `step.too_large` |

`check` rejects, `replaced` replaces. A value that an older version stored may break a rule. It can still be
read: `loads` requires only valid JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
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
"""Levels of lists and objects in a stored value. pydantic has the lowest limit of all readers, 200."""
ENVELOPE_LEVELS = 10
"""Levels that this library adds around a value: `tool_calls[0].arguments` of a reply are three."""
NESTING_OF_OLD = 150
"""Levels that earlier versions allowed in stored values."""
MAX_VALUES = 2_000_000
"""The most values in one stored value. A list that occurs twice in it counts twice, as in its JSON text."""
LARGEST_INTEGER = 2**63 - 1
SMALLEST_INTEGER = -(2**63)
"""The range of signed 64-bit integers, which readers in any language keep exactly."""
LARGEST_COUNT = 2**53
"""The largest count that is exact in languages whose only numbers are floats (2^53)."""
MAX_PATH_CHARS = 200

_HALF = "half of a surrogate pair (U+D800 to U+DFFF), which is not a character"
_BEYOND = "an integer beyond 64 bits; -2^63 to 2^63-1 are allowed, send a larger one as text"
_NOT_FINITE = "NaN or infinite, which JSON cannot express; leave it out or send null"
_TOO_DEEP = f"nested more than {MAX_NESTING} levels deep; send a flatter value, or its JSON as text"

_TOO_MANY = f"it has more than {MAX_VALUES:,} values"


class BadValue(ValueError):
    """A value breaks a rule of this module. `path` names its part, as `labels.x[3]`; empty: the value
    itself."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: it is {problem}" if path else f"it is {problem}")
        self.path, self.problem = path, problem


class NestedTooDeeply(ValueError):
    """A value has too many levels of lists and objects to be stored."""


# --- writing ---------------------------------------------------------------------------------------------


def dumps(value: Any) -> str:
    """Compact JSON. Raises TypeError or ValueError for a value that is not JSON, including NaN."""
    try:
        return "".join(_chunks(value, False))
    except RecursionError:
        raise ValueError(_ENDLESS) from None


def canonical_json(value: Any) -> str:
    """Compact JSON with sorted keys, so that equal values have equal texts. Raises as `dumps` does."""
    try:
        return "".join(_chunks_in_order(value, False))
    except RecursionError:
        raise ValueError(_ENDLESS) from None


def size_of(value: Any) -> int:
    """The value's size in bytes as JSON. Raises as `dumps` does."""
    return len(dumps(value).encode())


def _encoder(*, sort_keys: bool = False) -> Callable[[Any, bool], Iterable[str]]:
    """`iterencode` of a compact `JSONEncoder`. That one makes its C encoder anew for each value."""
    python = json.JSONEncoder(
        ensure_ascii=False,
        separators=(",", ":"),
        allow_nan=False,
        sort_keys=sort_keys,
        check_circular=False,  # what contains itself ends as RecursionError
    )
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:  # an interpreter without the C extension
        return python.iterencode
    in_c: Callable[[Any, bool], Iterable[str]] = make(
        None,
        python.default,
        json.encoder.encode_basestring,
        None,
        python.key_separator,
        python.item_separator,
        python.sort_keys,
        python.skipkeys,
        python.allow_nan,
    )
    return in_c


_chunks, _chunks_in_order = _encoder(), _encoder(sort_keys=True)
_ENDLESS = "it has too many levels, or it contains itself"


# --- reading ---------------------------------------------------------------------------------------------


def loads(text: str | bytes, *, nan_is_null: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError for invalid JSON and for too many levels.

    NaN and Infinity are not valid JSON, but some servers send them; with `nan_is_null` they are read as null.

    >>> loads('[NaN]', nan_is_null=True)
    [None]
    """
    decode = _decode_loosely if nan_is_null else _decode
    try:
        return decode(text if isinstance(text, str) else str(text, "utf-8"))
    except RecursionError:
        raise ValueError("it has too many levels to be read") from None


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_decode = json.JSONDecoder(parse_constant=_not_json).decode
_decode_loosely = json.JSONDecoder(parse_constant=lambda _: None).decode


# --- text ------------------------------------------------------------------------------------------------


def is_whole(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: it contains no half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_text(text: str) -> str:
    r"""The text with surrogate pairs joined to characters, and each lone half (JSON's "\ud83d") as U+FFFD.

    >>> whole_text("\ud83d\ude00"), whole_text("a\ud800") == "a\ufffd"
    ('😀', True)
    """
    return (
        text if is_whole(text) else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    )


# --- checking --------------------------------------------------------------------------------------------


def check(value: Any, path: str = "") -> None:
    """Raises `BadValue` for the first part of a value that breaks a rule for texts, numbers or nesting.

    Other types, such as dates, are not checked here: the models of the callers reject them.

    >>> check({"x": [1, 2, 2**63]}, "labels")
    Traceback (most recent call last):
    openagents_worker.jsontext.BadValue: labels.x[2]: it is an integer beyond 64 bits; -2^63 to 2^63-1 are ...
    """
    found = _problem(value, MAX_NESTING)
    if found is not None:
        steps, problem = found
        raise BadValue(_path(path, steps), problem)


def _problem(value: Any, levels: int) -> tuple[list[str | int], str] | None:
    """The first problem, and its path in the value from the inside out; None without a problem."""
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
            return [whole_text(step)], f"a key with {_HALF}"
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
    """The value as it is read back after storing: the same object, if storing does not change it, else a
    copy.

    Raises `NestedTooDeeply` for more than `levels` levels, TypeError or ValueError for a value that is not
    JSON, and ValueError for more than `MAX_VALUES` values.

    >>> replaced({1: (float("nan"), 2**64)})
    {'1': [None, '18446744073709551616']}
    """
    left = [MAX_VALUES]
    return value if _is_as_read(value, levels, left) else _replaced(value, levels, (), [MAX_VALUES])


_PLAIN = frozenset({str, int, float, bool, type(None)})


def has_at_most(value: Any, count: int) -> bool:
    """Whether at most `count` values are inside a value, counted as in its JSON text. It may contain itself.

    >>> has_at_most([1, {"a": [2, 3]}], 5), has_at_most([1, {"a": [2, 3]}], 4)
    (True, False)
    """
    unvisited = [value]
    while unvisited:
        each = unvisited.pop()
        if isinstance(each, dict | list | tuple):
            count -= len(each)
            if count < 0:
                return False
            items = each.values() if isinstance(each, dict) else each
            if not _PLAIN.issuperset(map(type, items)):  # a long list of plain values is looked at fast
                unvisited.extend(items)
    return True


def _is_as_read(value: Any, levels: int, left: list[int]) -> bool:
    """Whether writing and reading the value gives an equal one. `left` counts the values that may follow.

    It runs for every commit, so the code repeats itself instead of calling functions.
    """
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
    """A copy with the replacements. `outer` are the ids of the containers around the value, to find
    circles."""
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
    """A key as the text that JSON writes for it."""
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
    """An integer as text: decimal, or hexadecimal beyond Python's limit. `int(text, 0)` reads both."""
    try:
        return str(number)
    except ValueError:  # Python's limit is 4,300 digits, because the time grows with their square
        return hex(number)
