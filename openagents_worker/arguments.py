"""Arguments. The only place that checks what a caller gives beside a request: ids, reasons, numbers, times.

Each becomes part of a Redis command or of a key; what cannot is refused here, with a code, before anything is
sent.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

from openagents_worker.errors import RequestInvalid
from openagents_worker.jsontext import LARGEST_INTEGER, BadValue, check

__all__ = [
    "TEN_YEARS_MS",
    "iso_time",
    "number_of",
    "optional_text",
    "refusing",
    "seconds_of",
    "text_of_caller",
]

TEN_YEARS_MS = 10 * 365 * 24 * 3_600_000
"""The longest time that anything may be put off or bounded by: a longer one is a mistake in the unit."""
MAX_TEXT_CHARS = 8_000
"""Of a reason, a name or an id: as much as is kept of an error's message."""
MAX_TIME_CHARS = 64
"""Of a time in ISO 8601; one with microseconds and a time zone has 32."""
RULES = "docs/limits.md says which texts, numbers and times are allowed"


def text_of_caller(name: str, value: Any) -> str:
    """A text that whoever calls has given. Raises `RequestInvalid`."""
    if not isinstance(value, str):
        raise RequestInvalid(f"{name} must be text, not {type(value).__name__}", hint=f"{name}='…'")
    refusing(value, name)
    if len(value) > MAX_TEXT_CHARS:
        raise RequestInvalid(
            f"{name} has {len(value):,} characters, {MAX_TEXT_CHARS:,} are allowed",
            hint="give a reference to the whole",
        )
    return value


def optional_text(name: str, value: Any) -> str | None:
    """As `text_of_caller`; None where nothing was given."""
    return None if value is None else text_of_caller(name, value)


def number_of(name: str, value: Any, *, least: int = 0, most: int = LARGEST_INTEGER) -> int:
    """A whole number in these bounds. Raises `RequestInvalid`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestInvalid(f"{name} must be a whole number, not {type(value).__name__}", hint=RULES)
    if not least <= value <= most:
        found = value if abs(value) <= LARGEST_INTEGER else "a number of many digits"
        raise RequestInvalid(f"{name} is a whole number from {least:,} to {most:,}, not {found}", hint=RULES)
    return value


def seconds_of(name: str, value: Any) -> float | None:
    """A length of time in seconds, at most ten years; None for no end. Raises `RequestInvalid`."""
    if value is None or value == math.inf:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not seconds * 1000 <= TEN_YEARS_MS:  # also NaN
        raise RequestInvalid(f"{name} is a number of seconds, at most ten years", hint="None: without an end")
    return seconds


def iso_time(text: str) -> datetime:
    """A date, or a date and time, in ISO 8601. Raises ValueError.

    Python itself reads any number of digits behind a time, so a text of a megabyte.

    >>> iso_time("2026-01-31T14:00")
    datetime.datetime(2026, 1, 31, 14, 0)
    """
    if len(text) > MAX_TIME_CHARS:
        raise ValueError(f"{len(text):,} characters; a time has {MAX_TIME_CHARS} at most")
    return datetime.fromisoformat(text)


def refusing(value: Any, name: str = "", **ids: Any) -> None:
    """Raises `RequestInvalid` where a value breaks a rule of text, numbers or depth; it says where."""
    try:
        check(value, name)
    except BadValue as error:
        raise RequestInvalid(str(error), hint=RULES, **ids) from None
