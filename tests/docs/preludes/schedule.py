"""Beat's scheduler, which finds the entry due twice within one hour: that is one run."""

from datetime import UTC, datetime

import shop_schedule
from celery.beat import Scheduler
from shop_schedule import app, report_of_this_hour


class Clock:
    """It is always the same hour, also where the test begins at one and ends at the next."""

    @staticmethod
    def now(zone):
        return datetime(2026, 11, 26, 10, tzinfo=UTC)


shop_schedule.datetime = Clock
scheduler = Scheduler(app=app, lazy=True)
scheduler.setup_schedule()
entry = scheduler.get_schedule()["hourly-report"]
handles = [scheduler.apply_async(entry, advance=False) for _ in range(2)]


def check():
    assert answer == "Nothing happened."
    assert {handle.id for handle in handles} == {"report-2026-11-26T10"}
