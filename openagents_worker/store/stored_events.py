"""Stored events: the only place that reads the events of a run as they are stored, without watching it."""

from __future__ import annotations

from collections.abc import Sequence

from openagents_worker.events import RunEvent
from openagents_worker.store.codec import PayloadCodec
from openagents_worker.store.event_cursor import (
    HEAD_FIELDS,
    MAX_PAGE_EVENTS,
    Entry,
    RunHead,
    bytes_of,
    event_or_none,
    first_page_size,
    parse_head,
)
from openagents_worker.store.keys import Keys
from openagents_worker.store.paging import NEWEST_BYTES, PageSize
from openagents_worker.store.plan import CODEC, Plan
from openagents_worker.store.records import run_not_found

__all__ = ["history", "newest_events"]

FIRST_EVENTS = 50  # their size is not known yet


def history(keys: Keys, run_id: str, *, after: int = 0, most: int | None = None) -> Plan[list[RunEvent]]:
    """A plan: the stored events of a run behind number `after`, oldest first, at most `most`.

    Raises `RunNotFound`.
    """
    head = yield from _read_head(keys, run_id)
    codec: PayloadCodec = yield CODEC
    events: list[RunEvent] = []
    start, size = f"({after}-0" if after > 0 else "-", first_page_size()
    while most is None or len(events) < most:
        page = yield lambda r, start=start, count=size.count: r.xrange(
            keys("events", run_id), start, "+", count
        )
        if not page:
            break
        size.learn(len(page), bytes_of(page))
        events += filter(None, (event_or_none(head, entry, codec) for entry in page))
        start = f"({page[-1][0]}"
    return events[:most]


def newest_events(keys: Keys, run_id: str, newest: int) -> Plan[list[RunEvent]]:
    """A plan that returns the last stored events of a run, at most `newest`, oldest first.

    Fewer if they are large: it stops when it has read `NEWEST_BYTES`. Raises `RunNotFound`.
    """
    head = yield from _read_head(keys, run_id)
    codec: PayloadCodec = yield CODEC
    found, size, first = list[Entry](), 0, max(1, head.seq - newest + 1)
    end, window = head.seq, PageSize(first=FIRST_EVENTS, max_count=MAX_PAGE_EVENTS)
    while end >= first and size < NEWEST_BYTES:
        begin = max(first, end - window.count + 1)
        page: Sequence[Entry] = yield lambda r, begin=begin, end=end: r.xrange(
            keys("events", run_id), f"{begin}-0", f"{end}-0", count=MAX_PAGE_EVENTS
        )
        if not page:
            break  # what is before them was trimmed
        size += bytes_of(page)
        window.learn(len(page), bytes_of(page))
        found = [*page, *found]
        end = begin - 1
    return list(filter(None, (event_or_none(head, entry, codec) for entry in found)))


def _read_head(keys: Keys, run_id: str) -> Plan[RunHead]:
    head = parse_head(run_id, (yield lambda r: r.hmget(keys("run", run_id), HEAD_FIELDS)))
    if head is None:
        raise run_not_found(run_id)
    return head
