"""Arguments. The only place that checks arguments other than the request: ids, reasons, numbers, times.

Arguments become parts of Redis commands and keys. A value that cannot be used there is rejected here with an
error code, before anything is sent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

from openagents_worker.errors import RequestInvalid
from openagents_worker.jsontext import LARGEST_INTEGER, BadValue, check
from openagents_worker.suggest import guess

__all__ = [
    "TEN_YEARS_MS",
    "check_keywords",
    "iso_time",
    "number_of",
    "optional_text",
    "reject_unstorable",
    "seconds_of",
    "text_of_caller",
]

TEN_YEARS_MS = 10 * 365 * 24 * 3_600_000
"""The longest delay or time limit. A longer one is taken for a mistake in the unit."""
MAX_TEXT_CHARS = 8_000
"""The longest reason, name or id; the stored message of an error has the same limit."""
MAX_TIME_CHARS = 64
"""The longest time in ISO 8601; one with microseconds and a time zone has 32 characters."""
RULES = "docs/limits.md lists the allowed texts, numbers and times"


def check_keywords(call: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises TypeError for a keyword argument that this call does not have, as Python does for a function
    without `**options`."""
    for name in given:
        if name not in known:
            instead = guess(name, known) or f"it has {', '.join(sorted(known))}"
            raise TypeError(f"{call} got an unexpected keyword argument {name!r}: {instead}")


def text_of_caller(name: str, value: Any) -> str:
    """The value, if it is text that can be stored and has at most 8,000 characters. Raises
    `RequestInvalid`."""
    if not isinstance(value, str):
        raise RequestInvalid(f"{name} must be text, not {type(value).__name__}", hint=f"{name}='…'")
    reject_unstorable(value, name)
    if len(value) > MAX_TEXT_CHARS:
        raise RequestInvalid(
            f"{name} has {len(value):,} characters, but at most {MAX_TEXT_CHARS:,} are allowed",
            hint="use a reference (a URL, a key) to the full text",
        )
    return value


def optional_text(name: str, value: Any) -> str | None:
    """The same as `text_of_caller`, but None is allowed and returned."""
    return None if value is None else text_of_caller(name, value)


def number_of(name: str, value: Any, *, least: int = 0, most: int = LARGEST_INTEGER) -> int:
    """The value, if it is a whole number from `least` to `most`. Raises `RequestInvalid`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestInvalid(f"{name} must be a whole number, not {type(value).__name__}", hint=RULES)
    if not least <= value <= most:
        found = value if abs(value) <= LARGEST_INTEGER else "a number with many digits"
        raise RequestInvalid(
            f"{name} must be a whole number from {least:,} to {most:,}, not {found}", hint=RULES
        )
    return value


def seconds_of(name: str, value: Any) -> float | None:
    """The value as a duration in seconds, at most ten years. None and infinity: None, no limit.

    Raises `RequestInvalid`.
    """
    if value is None or value == math.inf:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not seconds * 1000 <= TEN_YEARS_MS:  # also NaN
        raise RequestInvalid(
            f"{name} must be a number of seconds, at most ten years", hint="use None for no limit"
        )
    return seconds


def iso_time(text: str) -> datetime:
    """A date, or a date and time, in ISO 8601. Raises ValueError.

    Python's parser accepts any number of digits after the seconds, so the length is limited here.

    >>> iso_time("2026-01-31T14:00")
    datetime.datetime(2026, 1, 31, 14, 0)
    """
    if len(text) > MAX_TIME_CHARS:
        raise ValueError(f"it has {len(text):,} characters, but a time has at most {MAX_TIME_CHARS}")
    return datetime.fromisoformat(text)


def reject_unstorable(value: Any, name: str = "", **ids: Any) -> None:
    """Raises `RequestInvalid` if a part of the value breaks a rule for texts, numbers or nesting.

    The message names the part, `name` is the beginning of its path, and `ids` become fields of the error.
    """
    try:
        check(value, name)
    except BadValue as error:
        raise RequestInvalid(str(error), hint=RULES, **ids) from None
