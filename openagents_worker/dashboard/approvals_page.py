"""The inbox of approvals. The only place that lists the calls that wait for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

from openagents_worker.dashboard.page import PageHandler, with_values
from openagents_worker.dashboard.run_page import approval_forms
from openagents_worker.dashboard.shown_text import ago_text, ms_of, now_ms, time_text
from openagents_worker.models import Approval
from openagents_worker.store.approvals import ApprovalFilters, list_approvals
from openagents_worker.store.row_reads import ReadBy

__all__ = ["ApprovalsPage"]

ROWS = 20  # runs of a page
CALLS = 5  # of one run; its own page shows more


class ApprovalsPage(PageHandler):
    """The calls that wait for an approval; the run that asked last is the first."""

    tab = "approvals"

    async def get(self) -> None:
        values = {name: self.query(name) for name in ("agent", "tenant")}
        cursor = self.get_query_argument("cursor", "") or None
        store = self.client.store
        filters: ApprovalFilters = {"agent_id": values["agent"], "tenant": values["tenant"]}
        page = await store.execute(
            list_approvals(store.keys, filters, limit=ROWS, cursor=cursor, read_by=ReadBy.SCRIPT)
        )
        path = f"{self.prefix}/approvals"
        self.show(
            "approvals.html",
            runs=list(_runs(page.items)),
            values=values,
            is_first=cursor is None,
            next_url=with_values(path, {**values, "cursor": page.next_cursor}) if page.next_cursor else None,
            problems=page.problems,
        )


def _runs(pending: Sequence[Approval]) -> Iterator[tuple[list[Any], int]]:
    """For each run the forms of its first calls, with age and expiry, and how many calls are left out."""
    now = now_ms()
    for _, asked in groupby(pending, key=lambda each: each.run_id):
        calls = list(asked)
        forms = [
            (*form, ago_text(ms_of(form[0].requested_at), now), _expiry(form[0].expires_at))
            for form in approval_forms(calls[:CALLS])
        ]
        yield forms, max(0, len(calls) - CALLS)


def _expiry(at: datetime | None) -> str:
    return time_text(ms_of(at)) if at is not None else ""
