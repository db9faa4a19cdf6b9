"""Paging: the only place that decides how many entries of a list or stream one command reads.

The sizes of entries differ by a factor of a thousand, and Redis serves no other client while it writes an
answer. The size of the entries of one page therefore determines the number of entries of the next page.
"""

from __future__ import annotations

__all__ = ["PageSize"]

PAGE_BYTES = 1024 * 1024  # Redis writes an answer of this size in a millisecond


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
