"""Dates and times: `current_time`, `date_parse`, `date_diff`. A time without a time zone is read as UTC."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from zoneinfo import ZoneInfo

from pydantic import Field

from openagents_worker.arguments import iso_time
from openagents_worker.errors import ToolValidationError
from openagents_worker.tools.base import ToolContext
from openagents_worker.tools.typed import READS_ONLY, TypedTool

__all__ = ["CurrentTime", "DateDiff", "DateParse", "utc_now"]

# Only unambiguous formats: 03/04/2024 is a day in April in Rome and in March in Boston.
FORMATS = (
    "%Y/%m/%d",
    "%Y/%m/%d %H:%M",
    "%d.%m.%Y",
    "%d.%m.%Y %H:%M",
    "%B %d, %Y",
    "%b %d, %Y",
    "%d %B %Y",
    "%d %b %Y",
)
_HAS_YEAR = re.compile(r"(?<!\d)\d{4}(?!\d)")
_MAIL_DATE = re.compile(
    r"([a-z]+, *)?\d\d?[ -][a-z]+[ -]\d+ +\d\d?:\d\d(:\d\d)? +([+-]\d{4}|UTC?|GMT|[ECMP][SD]T)", re.IGNORECASE
)
"""A date of e-mails and HTTP headers. Their parser reads many other texts, too, and drops what it does not
know, such as `PM` and CET."""
_NOT_WHAT_IT_SAYS = re.compile(r"\d{4}-|.*[A-Za-z][+-]\d")
"""Forms that dateutil understands in its own way: 2024-13-01 as 13 January, UTC+3 as three hours west."""
FORMATTED = "%Y-%m-%d %H:%M:%S"
MAX_DATE_CHARS = 100
UNITS = {
    "seconds": timedelta(seconds=1),
    "minutes": timedelta(minutes=1),
    "hours": timedelta(hours=1),
    "days": timedelta(days=1),
    "weeks": timedelta(weeks=1),
}


def utc_now() -> datetime:
    return datetime.now(UTC)


class CurrentTime(TypedTool):
    name = "current_time"
    description = "Tells the current date and time in a time zone."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        timezone: str = Field("UTC", description="An IANA time zone, for example `Europe/Berlin`.")

    def __init__(
        self, config: dict[str, Any] | None = None, *, now: Callable[[], datetime] = utc_now
    ) -> None:
        super().__init__(config)
        self._now = now

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        now = self._now().astimezone(_time_zone(args.timezone))
        return {**_time_parts(now), "formatted": now.strftime(FORMATTED), "timezone": args.timezone}


class DateParse(TypedTool):
    name = "date_parse"
    description = "Reads a date or time and gives it in ISO 8601 with its parts, weekday and Unix time."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        date: str = Field(
            description="ISO 8601 preferred; also `31.03.2024`, `March 31, 2024 5pm` and the like, if they "
            "have only one meaning."
        )

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        moment = _parse_time(args.date, self.name)
        parts = {"year": moment.year, "month": moment.month, "day": moment.day}
        return {**_time_parts(moment), **parts}


class DateDiff(TypedTool):
    name = "date_diff"
    description = "Computes how much later the second date is than the first; negative when it is earlier."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        date1: str = Field(description="The first date, ISO 8601 preferred.")
        date2: str = Field(description="The second date, ISO 8601 preferred.")
        unit: Literal["seconds", "minutes", "hours", "days", "weeks"] = Field(
            "days", description="The unit of the difference."
        )

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        first, second = _parse_time(args.date1, self.name), _parse_time(args.date2, self.name)
        difference = _whole((second - first) / UNITS[args.unit])
        seconds = _whole((second - first).total_seconds())
        return {"difference": difference, "unit": args.unit, "result": difference, "seconds": seconds}


def _time_parts(moment: datetime) -> dict[str, Any]:
    return {
        "iso": moment.isoformat(),
        "date": moment.date().isoformat(),
        "time": moment.strftime("%H:%M:%S"),
        "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")[
            moment.weekday()
        ],
        "unix": moment.timestamp(),
        "timestamp": moment.timestamp(),  # its name in the original SDK
    }


def _whole(number: float) -> float:
    """A number without a fraction as an integer."""
    return int(number) if number.is_integer() else number


def _time_zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # unknown name, or a path to a directory or outside the database
        raise ToolValidationError(
            f"timezone: {name[:80]!r} is not an IANA time zone",
            CurrentTime.name,
            hint="for example Europe/Berlin or UTC",
        ) from None


def _parse_time(text: str, tool_name: str) -> datetime:
    formats = (_format_parser(form) for form in FORMATS)
    for parse in (iso_time, *formats, _mail_date, _unambiguous_time):
        try:
            moment = parse(text.strip())
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    raise ToolValidationError(
        f"date: {text[:80]!r} is not an unambiguous date",
        tool_name,
        hint="use ISO 8601, for example 2024-03-31 or 2024-03-31T12:00:00+02:00",
    )


def _format_parser(form: str) -> Callable[[str], datetime]:
    return lambda text: datetime.strptime(text, form).replace(tzinfo=UTC)


def _mail_date(text: str) -> datetime:
    """A date in the form of e-mails (RFC 5322). Raises ValueError for another form."""
    if _MAIL_DATE.fullmatch(text) is None:
        raise ValueError("not a date of an e-mail")
    return parsedate_to_datetime(text)


def _unambiguous_time(text: str) -> datetime:
    """A time in any form that has a single meaning. Raises ValueError for others.

    It is read several times, with the day and with the month first, and with different values for parts that
    are missing. All readings must be equal.
    """
    from dateutil import parser  # 10 ms, for dates that no other parser reads

    if len(text) > MAX_DATE_CHARS or _HAS_YEAR.search(text) is None or _NOT_WHAT_IT_SAYS.match(text):
        raise ValueError("too long, without a year of four digits, or in a form that would be misread")
    readings = {
        parser.parse(text, default=missing, dayfirst=day_first, tzinfos=_known_zone)
        for missing in (datetime(2000, 1, 1), datetime(2003, 2, 2))  # noqa: DTZ001 - no zone: UTC is added later
        for day_first in (False, True)
    }
    if len(readings) != 1:
        raise ValueError("the date is ambiguous or incomplete")
    moment: datetime = readings.pop()
    return moment


def _known_zone(name: str | None, offset_s: int | None) -> tzinfo | None:
    """A zone by its offset; None if the text has none. Raises ValueError for an abbreviation such as IST,
    which has several meanings."""
    if name is not None and offset_s != 0:
        raise ValueError(f"{name} is not an unambiguous time zone")
    return None if offset_s is None else timezone(timedelta(seconds=offset_s))
