"""Text on pages. The only place that bounds and formats values for a page."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from openagents_worker.printable import one_line, printable
from openagents_worker.producer.time_text import age_text, clock_time, duration_text

__all__ = ["LongText", "cost_text", "count_text", "long_text", "ms_of", "now_ms", "short_text", "took_text"]

MAX_CHARS = 4_000  # of one value on a page: two screens of text
SHORT_CHARS = 120  # of a value on one line


@dataclass(frozen=True, slots=True)
class LongText:
    """The beginning of a text. `left_out` is the number of characters behind it."""

    text: str
    left_out: int = 0

    def __bool__(self) -> bool:
        return bool(self.text)


def long_text(value: Any, max_chars: int = MAX_CHARS) -> LongText:
    """A value as text of several lines, other values than text as JSON. Control characters are escaped."""
    if value is None:
        return LongText("")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2, default=str)
    return LongText(printable(text[:max_chars]), max(0, len(text) - max_chars))


def short_text(value: Any, max_chars: int = SHORT_CHARS) -> str:
    """A value on one line, cut with an ellipsis."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return one_line(text, max_chars)


def count_text(number: int, noun: str) -> str:
    """A count with its noun.

    >>> count_text(1, "retry"), count_text(2, "retry"), count_text(1200, "run")
    ('1 retry', '2 retries', '1,200 runs')
    """
    plural = f"{noun[:-1]}ies" if noun.endswith("ry") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def cost_text(usd: float | None) -> str:
    """A cost in US dollars, with at least two significant digits.

    >>> cost_text(None), cost_text(0), cost_text(0.0000881), cost_text(0.00123), cost_text(12.3456)
    ('-', '$0', '$0.000088', '$0.0012', '$12.35')
    """
    if usd is None:
        return "-"
    if not usd > 0:
        return "$0"
    digits = 2 if usd >= 0.1 else min(9, 1 - math.floor(math.log10(usd)))
    return f"${usd:,.{digits}f}"


def took_text(ms: float | None) -> str:
    """A duration in milliseconds; a dash if it is unknown."""
    return "-" if ms is None else duration_text(max(0, ms))


def time_text(ms: float | None) -> str:
    """A time in milliseconds since 1970; a dash if it is unknown."""
    return "-" if ms is None else clock_time(ms)


def ago_text(ms: float | None, now: float) -> str:
    """How long ago a time was; a dash if it is unknown."""
    return "-" if ms is None else age_text(now - ms)


def ms_of(at: datetime) -> int:
    """A time in milliseconds since 1970."""
    return round(at.timestamp() * 1000)


def now_ms() -> int:
    """The time of this process in milliseconds since 1970."""
    return ms_of(datetime.now(UTC))
