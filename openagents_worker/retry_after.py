"""Retry-After. The only place that reads from the headers of a reply whether to retry, and when."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["MAX_RETRY_AFTER_MS", "duration_ms", "rate_limit_reset_ms", "retry_after_ms", "should_retry"]

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")
_RESETS = re.compile(r"(?:x-|anthropic-)?ratelimit-(?:([a-z-]+)-)?reset(?:-([a-z-]+))?")
_LEAST_EPOCH_S = 1_000_000_000  # a larger number is a time, a smaller one a number of seconds

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


def should_retry(headers: Mapping[str, str]) -> bool | None:
    """Whether a failed request may succeed later, as its server says it: `x-should-retry`. None: unknown.

    OpenAI, Anthropic and some gateways send it. The packages of both follow it, whatever the status is.

    >>> should_retry({"x-should-retry": "false"}), should_retry({"x-should-retry": "perhaps"})
    (False, None)
    """
    return {"true": True, "false": False}.get(headers.get("x-should-retry", "").strip().lower())


def rate_limit_reset_ms(headers: Mapping[str, str], *, now: datetime | None = None) -> int | None:
    """Milliseconds until the used-up rate limits are reset, from headers like `x-ratelimit-reset-tokens`.

    A limit counts if its `remaining` is 0. A value is a duration ("6m0s"), seconds, a time since 1970 in
    seconds or milliseconds, or a date. The longest wait counts. None: no limit is known to be used up.
    """
    waits = [
        wait
        for name, value in headers.items()
        if (match := _RESETS.fullmatch(name.lower())) and _is_used_up(headers, name.lower())
        if (wait := _reset_ms(value, headers, now)) is not None and match
    ]
    return max(waits, default=None)


def _is_used_up(headers: Mapping[str, str], reset_name: str) -> bool:
    return _number(headers.get(reset_name.replace("reset", "remaining"))) == 0


def _reset_ms(value: str, headers: Mapping[str, str], now: datetime | None) -> int | None:
    server_now = _date(headers.get("date")) or now or datetime.now(UTC)
    number = _number(value)
    if number is None:
        moment = _iso(value) or _date(value)
        if moment is None:
            return duration_ms(value)
        wait_ms = (moment - server_now).total_seconds() * 1000
    elif number >= _LEAST_EPOCH_S:
        seconds = number / 1000 if number >= _LEAST_EPOCH_S * 1000 else number
        wait_ms = (seconds - server_now.timestamp()) * 1000
    else:
        wait_ms = number * 1000
    return math.ceil(min(max(0.0, wait_ms), MAX_RETRY_AFTER_MS))


def duration_ms(text: object) -> int | None:
    """The milliseconds of a duration; None if it is not one.

    >>> duration_ms("1m30.5s"), duration_ms("250ms"), duration_ms("soon")
    (90500, 250, None)
    """
    match = _DURATION.fullmatch(text) if isinstance(text, str) and 0 < len(text) < 40 else None
    if match is None or not any(match.groups()):
        return None
    hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return math.ceil(min(((hours * 60 + minutes) * 60 + seconds) * 1000 + milliseconds, MAX_RETRY_AFTER_MS))


def _iso(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


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
