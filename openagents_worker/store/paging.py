"""Paging: the only place that says how many entries of a list or a stream are read with one command.

Entries differ a thousandfold in size, and Redis serves nobody else while it writes an answer. So a page has
as many as fit into a size, by what the entries before had.
"""

from __future__ import annotations

__all__ = ["PageSize"]

ANSWER_BYTES = 1024 * 1024  # Redis writes it in a millisecond


class PageSize:
    """How many entries the next page of one reading has; it begins with a few.

    >>> size = PageSize(first=100, most=500)
    >>> size.learn(100, 100 * 50_000)
    >>> size.count
    20
    """

    def __init__(self, *, first: int, most: int) -> None:
        self.count = min(first, most)
        self._most = most

    def learn(self, entries: int, size: int) -> None:
        """A page had so many entries, and so many bytes."""
        if entries > 0:
            self.count = max(1, min(self._most, ANSWER_BYTES * entries // max(size, 1)))
