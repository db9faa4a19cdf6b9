"""The inbox of approvals. The only place that lists the calls that wait for a person."""

from __future__ import annotations

from datetime import datetime

from openagents_worker.dashboard.page import PageHandler, with_values
from openagents_worker.dashboard.run_page import approval_forms
from openagents_worker.dashboard.shown_text import ago_text, ms_of, now_ms, time_text

__all__ = ["ApprovalsPage"]

ROWS = 20


class ApprovalsPage(PageHandler):
    """The calls that wait for an approval; the run that asked last is the first."""

    tab = "approvals"

    async def get(self) -> None:
        values = {name: self.query(name) for name in ("agent", "tenant")}
        cursor = self.get_query_argument("cursor", "") or None
        page = await self.client.approvals(
            limit=ROWS, cursor=cursor, agent_id=values["agent"], tenant=values["tenant"]
        )
        now = now_ms()
        path = f"{self.prefix}/approvals"
        self.show(
            "approvals.html",
            approvals=[
                (*form, ago_text(ms_of(form[0].requested_at), now), _expiry(form[0].expires_at))
                for form in approval_forms(page.items)
            ],
            values=values,
            is_first=cursor is None,
            next_url=with_values(path, {**values, "cursor": page.next_cursor}) if page.next_cursor else None,
            problems=page.problems[:ROWS],
        )


def _expiry(at: datetime | None) -> str:
    return time_text(ms_of(at)) if at is not None else ""
