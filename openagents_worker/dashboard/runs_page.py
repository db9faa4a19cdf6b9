"""The list of runs. The only place that reads the filters of the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from openagents_worker.dashboard.page import PageHandler, with_values
from openagents_worker.dashboard.shown_text import cost_text, now_ms, short_text, took_text
from openagents_worker.errors import RequestInvalid, RunNotFound
from openagents_worker.models import RunRecord, RunState
from openagents_worker.store.list_states import CompareBy
from openagents_worker.store.listing import RunFilter, list_runs

__all__ = ["RunRow", "RunsPage", "run_rows"]

ROWS = 25  # of a page: one command of Redis each
MAX_SCANNED = 10_000  # runs that are examined for a page
FILTERS = ("state", "agent", "session", "tenant", "label", "code", "id")


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run in a list."""

    record: RunRecord
    input_text: str
    reason: str
    took: str
    cost: str


class RunsPage(PageHandler):
    """The runs that match all filters, newest first."""

    async def get(self) -> None:
        values = {name: self.query(name) for name in FILTERS}
        if values["id"] and await self._is_run(values["id"]):
            self.redirect(self.run_path(values["id"]))
            return
        cursor = self.get_query_argument("cursor", "") or None
        page = await self.client.store.execute(
            list_runs(
                self.client.store.keys,
                _filter_of(values),
                limit=ROWS,
                cursor=cursor,
                max_scanned=MAX_SCANNED,
                compare_by=CompareBy.SCRIPT,
            )
        )
        path = f"{self.prefix}/runs"
        self.show(
            "runs.html",
            rows=list(run_rows(page)),
            values=values,
            states=list(RunState),
            problems=page.problems,
            is_filtered=any(values.values()),
            is_first=cursor is None,
            first_url=with_values(path, values),
            next_url=with_values(path, {**values, "cursor": page.next_cursor}) if page.next_cursor else None,
            scanned=MAX_SCANNED,
        )

    async def _is_run(self, run_id: str) -> bool:
        try:
            await self.client.record(run_id)
        except (RunNotFound, RequestInvalid):
            return False
        return True


def _filter_of(values: dict[str, str | None]) -> RunFilter:
    """The filter for these values. Raises `RequestInvalid`."""
    labels = dict([_label(values["label"])]) if values["label"] else {}
    filters = RunFilter.of(
        {
            "state": values["state"],
            "agent_id": values["agent"],
            "session_id": values["session"],
            "tenant": values["tenant"],
            "labels": labels,
            "code": values["code"],
        }
    )
    return replace(filters, id_part=values["id"])


def _label(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not (found and name and value):
        raise RequestInvalid(f"{text!r} is not a label", hint="write name=value")
    return name, value


def run_rows(records: Any) -> Iterator[RunRow]:
    """The rows of a list of runs."""
    now = now_ms()
    for record in records:
        began = record.started_ms or record.created_ms
        ended = record.ended_ms or now
        request = record.request
        yield RunRow(
            record,
            short_text(request.input_text) if request is not None else "",
            _reason(record),
            took_text(ended - began) if began else "-",
            cost_text(record.usage.cost_usd),
        )


def _reason(record: RunRecord) -> str:
    """Why the run ended or waits, in a few words."""
    if record.reason_code:
        return record.reason_code
    return short_text(", ".join(dict.fromkeys(map(str, record.waiting))), 80)
