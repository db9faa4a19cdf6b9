"""Retry-After. The only place that reads from the headers of a reply when to come back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["MAX_RETRY_AFTER_MS", "retry_after_ms"]

MAX_RETRY_AFTER_MS = 24 * 60 * 60 * 1000  # quotas are renewed each day; a longer pause is a mistake


def retry_after_ms(headers: Mapping[str, str], *, now: datetime | None = None) -> int | None:
    """How long a reply asks to stay away: `retry-after-ms`, or `Retry-After` in seconds or as a date.

    A date is measured against the reply's own `Date`, because the other clock need not agree with ours.
    Anything unreadable counts as not given; what is longer than a day counts as a day.
    """
    given = _number(headers.get("retry-after-ms"))
    if given is None and (seconds := _number(headers.get("retry-after"))) is not None:
        given = seconds * 1000
    if given is None and (date := _date(headers.get("retry-after"))) is not None:
        server_now = _date(headers.get("date")) or now or datetime.now(UTC)
        given = (date - server_now).total_seconds() * 1000
    return None if given is None else math.ceil(min(max(0.0, given), MAX_RETRY_AFTER_MS))


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _date(text: str | None) -> datetime | None:
    try:
        date = parsedate_to_datetime(text or "")
        return date if date.tzinfo else date.replace(tzinfo=UTC)
    except Exception:  # noqa: BLE001 - the parser of e-mail raises what it meets: IndexError, OverflowError
        return None
