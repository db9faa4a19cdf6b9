"""Retry-After. The only place that reads from the headers of a reply how long to wait before a retry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["MAX_RETRY_AFTER_MS", "retry_after_ms"]

MAX_RETRY_AFTER_MS = 24 * 60 * 60 * 1000  # quotas are renewed each day; a longer wait is taken for a mistake


def retry_after_ms(headers: Mapping[str, str], *, now: datetime | None = None) -> int | None:
    """The requested wait in milliseconds: `retry-after-ms`, or `Retry-After` in seconds or as a date.

    A date is compared with the `Date` of the reply, because the clock of the server may differ. The result is
    None if there is no valid value, and at most a day. The header `Retry-After` is defined in RFC 9110.
    """
    wait_ms = _number(headers.get("retry-after-ms"))
    if wait_ms is None and (seconds := _number(headers.get("retry-after"))) is not None:
        wait_ms = seconds * 1000
    if wait_ms is None and (date := _date(headers.get("retry-after"))) is not None:
        server_now = _date(headers.get("date")) or now or datetime.now(UTC)
        wait_ms = (date - server_now).total_seconds() * 1000
    return None if wait_ms is None else math.ceil(min(max(0.0, wait_ms), MAX_RETRY_AFTER_MS))


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
    except Exception:  # noqa: BLE001 - this parser also raises IndexError and OverflowError
        return None
