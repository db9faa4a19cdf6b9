"""Dates and times: `current_time`, `date_parse`, `date_diff`. A time without a zone is taken as UTC."""

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

# Only forms that mean one day to everybody: 03/04/2024 is April in Rome and March in Boston.
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
        return {**_described(self._now().astimezone(_zone(args.timezone))), "timezone": args.timezone}


class DateParse(TypedTool):
    name = "date_parse"
    description = "Reads a date or time and gives it in ISO 8601 with its parts, weekday and Unix time."
    spec = READS_ONLY

    class Params(TypedTool.Params):
        date: str = Field(
            description="ISO 8601 preferred; also `2024/03/31`, `31.03.2024`, `March 31, 2024`."
        )

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        return _described(_parsed(args.date, self.name))


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
        difference = (_parsed(args.date2, self.name) - _parsed(args.date1, self.name)) / UNITS[args.unit]
        return {"difference": int(difference) if difference.is_integer() else difference, "unit": args.unit}


def _described(moment: datetime) -> dict[str, Any]:
    return {
        "iso": moment.isoformat(),
        "date": moment.date().isoformat(),
        "time": moment.strftime("%H:%M:%S"),
        "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")[
            moment.weekday()
        ],
        "unix": moment.timestamp(),
    }


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError):  # unknown name, a directory, a path that leads elsewhere
        raise ToolValidationError(
            f"timezone: {name[:80]!r} is no IANA time zone",
            CurrentTime.name,
            hint="for example Europe/Berlin or UTC",
        ) from None


def _parsed(text: str, tool_name: str) -> datetime:
    for reader in (iso_time, *(_reader(form) for form in FORMATS), parsedate_to_datetime):
        try:
            moment = reader(text.strip())
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    raise ToolValidationError(
        f"date: {text[:80]!r} cannot be read as one certain date",
        tool_name,
        hint="use ISO 8601, for example 2024-03-31 or 2024-03-31T12:00:00+02:00",
    )


def _reader(form: str) -> Callable[[str], datetime]:
    return lambda text: datetime.strptime(text, form).replace(tzinfo=UTC)
