"""Times as text. The only place that formats times, ages and durations for people."""

from __future__ import annotations

from datetime import UTC, datetime

__all__ = ["UNITS_S", "age_text", "clock_time", "duration_text"]

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def clock_time(at_ms: int | float) -> str:
    """A time (milliseconds since the epoch) in local time. The date is included unless it is today.

    `?` for a number that is not a time, as in a damaged record.
    """
    try:
        at = datetime.fromtimestamp(at_ms / 1000, UTC).astimezone()
    except (ValueError, OverflowError, OSError):  # ValueError: the year 10,000; also NaN
        return "?"
    today = datetime.now(UTC).astimezone().date()
    return f"{at:%H:%M:%S}" if at.date() == today else f"{at:%Y-%m-%d %H:%M:%S}"


def age_text(ms: int | float) -> str:
    """An age in milliseconds as text, in its largest unit.

    >>> age_text(900), age_text(59_000), age_text(61_000), age_text(7_200_000), age_text(200_000_000)
    ('1s', '59s', '1m', '2h', '2d')
    """
    seconds = max(ms, 0) / 1000
    for unit, size_s in reversed(UNITS_S.items()):
        if seconds >= size_s and unit != "w":
            return f"{int(seconds // size_s)}{unit}"
    return f"{round(seconds)}s"


def duration_text(ms: int | float) -> str:
    """A duration in milliseconds as text.

    >>> duration_text(12), duration_text(1234), duration_text(83_000), duration_text(7_260_000)
    ('12 ms', '1.2 s', '1 min 23 s', '2 h 1 min')
    """
    if ms < 1000:
        return f"{round(ms)} ms"
    if ms < 60_000:
        return f"{ms / 1000:.1f} s"
    minutes, seconds = divmod(round(ms / 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
