"""Date and time tools: unambiguous dates are read, ambiguous ones are rejected."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openagents_worker.errors import ToolValidationError
from openagents_worker.tools.builtin.clock import UNITS, CurrentTime, DateDiff, DateParse

NOON = datetime(2024, 3, 31, 12, 0, tzinfo=UTC)


async def test_the_current_time_is_in_the_requested_time_zone() -> None:
    """Including daylight saving time. `unix` is the same in every time zone."""
    clock = CurrentTime(now=lambda: NOON)

    berlin = await clock.invoke({"timezone": "Europe/Berlin"}, None)

    assert berlin == {
        "iso": "2024-03-31T14:00:00+02:00",
        "date": "2024-03-31",
        "time": "14:00:00",
        "weekday": "Sunday",
        "unix": NOON.timestamp(),
        "timestamp": NOON.timestamp(),
        "formatted": "2024-03-31 14:00:00",
        "timezone": "Europe/Berlin",
    }
    assert (await clock.invoke({}, None))["iso"] == "2024-03-31T12:00:00+00:00"


@pytest.mark.parametrize("zone", ["Mars/Olympus", "../../etc/passwd", "", "Europe", "\0"])
async def test_an_unknown_time_zone_is_refused(zone: str) -> None:
    """The error shows an example of a time zone."""
    with pytest.raises(ToolValidationError, match="IANA"):
        await CurrentTime(now=lambda: NOON).invoke({"timezone": zone}, None)


@pytest.mark.parametrize(
    "text",
    [
        "2024-03-31T12:00:00Z",
        "2024-03-31 12:00",
        "20240331T120000",
        "2024-03-31T14:00:00+02:00",
        "31.03.2024 12:00",
        "2024/03/31 12:00",
        "Sun, 31 Mar 2024 12:00:00 GMT",
        "31/03/2024 12pm",
        "12:00 on 31st of March 2024",
        "March 31, 2024 2pm +0200",
        "31 Mar 2024 12:00 PM",
        "Sun, 31 Mar 2024 08:00 EDT",
        "Sunday, 31-Mar-24 12:00:00 GMT",
        "Sun Mar 31 12:00:00 2024",
    ],
)
async def test_one_moment_is_read_from_all_its_usual_forms(text: str) -> None:
    """ISO 8601, other unambiguous formats, and the date format of e-mails."""
    assert (await DateParse().invoke({"date": text}, None))["unix"] == NOON.timestamp()


@pytest.mark.parametrize("text", ["31 Mar 2024 5:30 PM", "March 31, 2024 5:30 pm", "Mar 31 2024 05:30:00 PM"])
async def test_an_hour_in_the_afternoon_is_one(text: str) -> None:
    """With minutes, too."""
    assert (await DateParse().invoke({"date": text}, None))["iso"] == "2024-03-31T17:30:00+00:00"


@pytest.mark.parametrize(
    "text", ["March 31, 2024", "Mar 31, 2024", "31 March 2024", "2024-03-31", "31.03.2024"]
)
async def test_a_day_is_its_beginning_in_utc(text: str) -> None:
    """A date without time and time zone is midnight UTC."""
    assert (await DateParse().invoke({"date": text}, None))["iso"] == "2024-03-31T00:00:00+00:00"


@pytest.mark.parametrize(
    "text",
    [
        *("03/04/2024", "yesterday", "2024-02-30", "", "2024-13-01"),
        *("March 2024", "31/03/24", "5pm", "31 March", "31 March 2024 5pm IST", "31 March 2024 5pm UTC+3"),
        *("31 Mar 2024 10:00 CET", "Sun, 31 Mar 2024 10:00:00 IST", "31 Mar 2024 10:00 BST"),
        "31 March 2024 " + "x" * 100,
    ],
)
async def test_what_is_not_certain_is_refused(text: str) -> None:
    """03/04/2024 is in April in Rome and in March in Boston, so the model must use another format."""
    with pytest.raises(ToolValidationError, match="unambiguous") as caught:
        await DateParse().invoke({"date": text}, None)
    assert caught.value.hint


@settings(deadline=None)  # the machine may be busy
@given(st.text() | st.text(alphabet="0123456789-:+TZ ./,", max_size=30) | st.datetimes().map(str))
def test_any_text_is_a_date_or_a_coded_error(text: str) -> None:
    """No text raises an unexpected exception."""
    with contextlib.suppress(ToolValidationError):
        assert asyncio.run(DateParse().invoke({"date": text}, None))["iso"]


@pytest.mark.parametrize(
    ("date1", "date2", "unit", "difference"),
    [
        ("2024-02-28", "2024-03-01", "days", 2),
        ("2024-03-01", "2024-02-28", "days", -2),
        ("2024-01-01", "2024-01-01T12:00", "days", 0.5),
        ("2024-01-01T00:00+02:00", "2024-01-01T00:00", "hours", 2),
        ("2024-01-01", "2024-01-15", "weeks", 2),
        ("2024-01-01T00:00:00", "2024-01-01T00:01:30", "minutes", 1.5),
    ],
)
async def test_the_difference_counts_from_the_first_to_the_second(
    date1: str, date2: str, unit: str, difference: Any
) -> None:
    """It is an integer if possible. Time zones are taken into account."""
    result = await DateDiff().invoke({"date1": date1, "date2": date2, "unit": unit}, None)
    assert (result["difference"], result["result"], result["unit"]) == (difference, difference, unit)
    assert result["seconds"] == difference * UNITS[unit].total_seconds()
