"""The list of runs. The only place that reads the filters of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from openagents_worker.dashboard.page import PageHandler, with_values
from openagents_worker.dashboard.shown_text import cost_text, now_ms, short_text, took_text
from openagents_worker.errors import RequestInvalid, RunNotFound
from openagents_worker.models import RunRecord, RunState
from openagents_worker.producer.waiting_reason import read_workers_for, short_reason
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.fleet import WorkerInfo
from openagents_worker.store.list_states import CompareBy
from openagents_worker.store.listing import RunFilter, list_runs
from openagents_worker.store.row_reads import ReadBy

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
            rows=await run_rows(self.client.store, page.items),
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


async def run_rows(store: AsyncStore, records: Sequence[RunRecord]) -> list[RunRow]:
    """The rows of a list of runs. Reads why its queued runs wait."""
    workers = await store.execute(read_workers_for(store.keys, records, ReadBy.SCRIPT))
    now = now_ms()
    return [_row(record, workers, now) for record in records]


def _row(record: RunRecord, workers: Sequence[WorkerInfo] | None, now: int) -> RunRow:
    began = record.started_ms or record.created_ms
    request = record.request
    return RunRow(
        record,
        short_text(request.input_text) if request is not None else "",
        short_text(short_reason(record, workers), 80),
        took_text((record.ended_ms or now) - began) if began else "-",
        cost_text(record.usage.cost_usd),
    )
