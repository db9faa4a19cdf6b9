"""Paging: the only place that decides how many entries of a list, set or stream one command reads.

The sizes of entries differ by a factor of a thousand, and Redis serves no other client while it writes an
answer. The size of the entries of one page therefore determines the number of entries of the next page.
"""

from __future__ import annotations

from openagents_worker.store.plan import Plan

__all__ = ["IDS_PER_PAGE", "NEWEST_BYTES", "PageSize", "read_ids"]

PAGE_BYTES = 1024 * 1024  # Redis writes an answer of this size in a millisecond
IDS_PER_PAGE = 1000  # run ids: 40 KB
NEWEST_BYTES = 4 * 1024 * 1024
"""Of the last entries that are read for a page in Flower, which is read again every few seconds."""


class PageSize:
    """The number of entries of the next page (`count`). It starts at `first` and is at most `max_count`.

    >>> size = PageSize(first=100, max_count=500)
    >>> size.learn(100, 100 * 50_000)
    >>> size.count
    20
    """

    def __init__(self, *, first: int, max_count: int) -> None:
        self.count = min(first, max_count)
        self._max_count = max_count

    def learn(self, entries: int, size: int) -> None:
        """Adapt `count` after a page with so many entries and `size` bytes."""
        if entries > 0:
            self.count = max(1, min(self._max_count, PAGE_BYTES * entries // max(size, 1)))


def read_ids(key: str, *, begin: int = 0) -> Plan[list[str]]:
    """A plan that returns the members of a sorted set from the rank `begin` on, read in pages."""
    found: list[str] = []
    while True:
        at = begin + len(found)
        page = yield lambda r, at=at: r.zrange(key, at, at + IDS_PER_PAGE - 1)
        found += page
        if len(page) < IDS_PER_PAGE:
            return found
