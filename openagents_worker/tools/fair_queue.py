"""Fair queue. The only place that decides whose work is next where several wait for few threads.

Groups take turns, then owners within a group: an agent's runs share its turns, and one run with much work
does not delay the others. The work of one owner keeps its order.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["FairQueue"]

T = TypeVar("T")


class FairQueue(Generic[T]):
    """What waits, by group and owner. It holds no lock; whoever shares it does.

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
        """The last in its owner's order. An owner that had nothing waiting comes after those that have."""
        self._groups.setdefault(group, OrderedDict()).setdefault(owner, deque()).append(item)
        self._count += 1

    def take(self) -> T:
        """The next one. Raises IndexError when nothing waits."""
        if not self._count:
            raise IndexError("nothing waits")
        group, owners = self._groups.popitem(last=False)
        owner, items = owners.popitem(last=False)
        item = items.popleft()
        if items:
            owners[owner] = items  # after the others
        if owners:
            self._groups[group] = owners
        self._count -= 1
        return item
