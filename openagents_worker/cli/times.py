"""Options such as `--since`. The only place that parses the times of options."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import click

from openagents_worker.arguments import iso_time
from openagents_worker.producer.time_text import UNITS_S

__all__ = ["parse_time_option"]

_AGO = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*$")


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
