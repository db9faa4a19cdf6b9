"""Times as text. The only place that formats times, ages and durations, and parses options like `--since`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import click

from openagents_worker.arguments import iso_time

__all__ = ["clock_time", "age_text", "duration_text", "parse_time_option"]

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_AGO = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*$")


def clock_time(at_ms: int | float) -> str:
    """A time (milliseconds since the epoch) in local time. The date is included unless it is today."""
    at = datetime.fromtimestamp(at_ms / 1000, UTC).astimezone()
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


def parse_time_option(ctx: click.Context, param: click.Parameter, value: str | None) -> datetime | None:
    """Parse the value of a time option: an age such as `1h`, or a date with or without a time.

    A date without a time zone is local. Raises `click.BadParameter`.
    """
    if value is None:
        return None
    try:
        if found := _AGO.match(value):
            return datetime.now(UTC) - timedelta(seconds=float(found[1]) * UNITS_S[found[2]])
        return iso_time(value).astimezone()
    except (ValueError, OverflowError):
        example = "an age (45s, 30m, 1h, 7d) or a date and time (2026-01-31T14:00)"
        raise click.BadParameter(f"{value!r} is not a time; give {example}", ctx, param) from None
