"""Dates and times: `current_time`, `date_parse`, `date_diff`. A time without a time zone is read as UTC."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
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
        return {**_time_parts(self._now().astimezone(_time_zone(args.timezone))), "timezone": args.timezone}


class DateParse(TypedTool):
    name = "date_parse"
    description = "Reads a date or time and gives it in ISO 8601 with its parts, weekday and Unix time."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        date: str = Field(
            description="ISO 8601 preferred; also `2024/03/31`, `31.03.2024`, `March 31, 2024`."
        )

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        return _time_parts(_parse_time(args.date, self.name))


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
        difference = (second - first) / UNITS[args.unit]
        return {"difference": int(difference) if difference.is_integer() else difference, "unit": args.unit}


def _time_parts(moment: datetime) -> dict[str, Any]:
    return {
        "iso": moment.isoformat(),
        "date": moment.date().isoformat(),
        "time": moment.strftime("%H:%M:%S"),
        "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")[
            moment.weekday()
        ],
        "unix": moment.timestamp(),
    }


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
    for parse in (iso_time, *(_format_parser(form) for form in FORMATS), parsedate_to_datetime):
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
