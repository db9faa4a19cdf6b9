"""Place ids: the call ids of runs that are replayed by place. An id says where in the program a call is.

An id is a branch path and a count. `3` is the third call of the pattern's task. `2/1.4` is the fourth call of
the first task that was started after the second call. `3>.1` is the first call made inside call 3.

Counts are taken when a call begins, so the order in which calls end does not matter. Tasks that start at one
place must make their first calls in the same order in every attempt. `asyncio.gather` and `asyncio.TaskGroup`
guarantee this for coroutines that make a call before their first await.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["PlaceIds"]


@dataclass(frozen=True, slots=True)
class _Place:
    owner: PlaceIds
    path: str
    count: int
    task: asyncio.Task[Any] | None

    @property
    def call_id(self) -> str:
        return f"{self.path}.{self.count}" if self.path else str(self.count)


_current_place: ContextVar[_Place | None] = ContextVar("openagents_place", default=None)


class PlaceIds:
    """Assigns the place ids of one attempt."""

    def __init__(self) -> None:
        self._branches: defaultdict[str, int] = defaultdict(int)

    def begin(self, path: str = "") -> None:
        """Make the current task the root of a branch. Its calls are counted from 1."""
        _current_place.set(_Place(self, path, 0, asyncio.current_task()))

    def end(self) -> None:
        """Forget the place of the current task, which makes no more calls."""
        _current_place.set(None)

    def enter(self) -> str:
        """The id of a call that begins now in the current task."""
        place = self._place()
        place = replace(place, count=place.count + 1)
        _current_place.set(place)
        return place.call_id

    def branch(self) -> str:
        """The branch path of the current task; '' is the task of the pattern."""
        return self._place().path

    @contextmanager
    def inside(self, call_id: str) -> Iterator[None]:
        """A context manager: calls made in its block are made inside the call `call_id`."""
        token = _current_place.set(_Place(self, f"{call_id}>", 0, asyncio.current_task()))
        try:
            yield
        finally:
            _current_place.reset(token)

    def _place(self) -> _Place:
        task = asyncio.current_task()
        place = _current_place.get()
        if place is None or place.owner is not self:
            # A task that the pattern did not start: it becomes a branch of the root.
            place = _Place(self, "", 0, None)
        if place.task is not task:
            self._branches[place.call_id] += 1
            place = _Place(self, f"{place.call_id}/{self._branches[place.call_id]}", 0, task)
            _current_place.set(place)
        return place
