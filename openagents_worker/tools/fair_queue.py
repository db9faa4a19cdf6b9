"""Fair queue: the only place that decides whose work is next when there are more tasks than threads.

Scheduling is round-robin: first over groups, then over the owners in a group. So the runs of one agent share
that agent's turns, and a run with much work does not delay other runs. The work of one owner keeps its order.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Waiting items, by group and owner. It is not thread-safe: callers hold a lock of their own.

    >>> queue = FairQueue[str]()
    >>> for item in ("a1", "a2", "b1"):
    ...     queue.put("shop", owner=item[0], item=item)
    >>> [queue.take(), queue.take(), queue.take()]
    ['a1', 'b1', 'a2']
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[Hashable, OrderedDict[Hashable, deque[T]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, group: Hashable, owner: Hashable, item: T) -> None:
        """Append an item to its owner's queue. An owner with an empty queue comes after the other owners."""
        self._groups.setdefault(group, OrderedDict()).setdefault(owner, deque()).append(item)
        self._count += 1

    def take(self) -> T:
        """Remove and return the next item. Raises IndexError if the queue is empty."""
        if not self._count:
            raise IndexError("the queue is empty")
        group, owners = self._groups.popitem(last=False)
        owner, items = owners.popitem(last=False)
        item = items.popleft()
        if items:
            owners[owner] = items  # to the end of the order
        if owners:
            self._groups[group] = owners
        self._count -= 1
        return item
