"""Sessions. The only place that shows conversations: their transcript, their queue and their size."""

from __future__ import annotations

from openagents_worker.dashboard.conversation import messages_of_transcript
from openagents_worker.dashboard.page import PageHandler, with_values
from openagents_worker.dashboard.runs_page import run_rows
from openagents_worker.dashboard.shown_text import ago_text, count_text, long_text, now_ms, short_text
from openagents_worker.store.listing import list_sessions
from openagents_worker.store.row_reads import ReadBy
from openagents_worker.store.sessions import SessionStore, session_plan

__all__ = ["SessionPage", "SessionsPage"]

ROWS = 25
MESSAGES = 100  # the newest ones of a transcript
WAITING = 50
ARTIFACTS = 20
VALUE_CHARS = 2_000


class SessionsPage(PageHandler):
    """The sessions; the one with the newest run is the first."""

    tab = "sessions"

    async def get(self) -> None:
        if session_id := self.query("id"):
            self.redirect(self.session_path(session_id))
            return
        cursor = self.get_query_argument("cursor", "") or None
        store = self.client.store
        page = await store.execute(
            list_sessions(store.keys, limit=ROWS, cursor=cursor, read_by=ReadBy.SCRIPT)
        )
        now = now_ms()
        path = f"{self.prefix}/sessions"
        self.show(
            "sessions.html",
            rows=[(row, ago_text(row.last_run_ms, now)) for row in page],
            problems=page.problems,
            is_first=cursor is None,
            next_url=with_values(path, {"cursor": page.next_cursor}) if page.next_cursor else None,
        )


class SessionPage(PageHandler):
    """A session: who works in it, who waits, what was said, and what it takes in Redis."""

    tab = "sessions"

    async def get(self, session_id: str) -> None:
        store = self.client.store
        session = await store.execute(session_plan(store.keys, session_id, MESSAGES))
        messages = await SessionStore(store).count_messages(session_id)
        waiting = await store.ask(lambda r: r.zcard(store.keys("session_queue", session_id)))
        runs = await self.client.runs(session_id=session_id, limit=ROWS)
        self.show(
            "session.html",
            session=session,
            size=_size_text(session.bytes),
            messages=messages_of_transcript(session.transcript),
            left_out=max(0, messages - len(session.transcript)),
            waiting=session.waiting[:WAITING],
            more_waiting=max(0, waiting - len(session.waiting[:WAITING])),
            rows=await run_rows(store, runs.items),
            problems=runs.problems,
            artifacts=[
                (short_text(each.name), short_text(each.kind), long_text(each.payload, VALUE_CHARS))
                for each in session.artifacts[-ARTIFACTS:]
            ],
            state=long_text(dict(session.state), VALUE_CHARS) if session.state else None,
            count=count_text(messages, "message"),
        )


def _size_text(size: int) -> str:
    """A number of bytes in its largest unit.

    >>> _size_text(900), _size_text(2048), _size_text(3 * 1024 * 1024)
    ('900 B', '2.0 KiB', '3.0 MiB')
    """
    if size < 1024:
        return f"{size} B"
    return f"{size / 1024:.1f} KiB" if size < 1024 * 1024 else f"{size / 1024 / 1024:.1f} MiB"
