"""Call keys: where in the program a recorded call stands. The same in every attempt.

A key is a branch path and a count: `3` is the third call of the pattern's own task; `2/1.4` is the fourth
call of the first task that was started after the second call; `3>.1` is the first call made inside call 3.
Counts are taken synchronously at entry, so the order in which calls end has no part in them. What must be
the same in every attempt is the order in which tasks that start at one place make their first call, as
`asyncio.gather` and `asyncio.TaskGroup` guarantee for coroutines that call before they wait for anything.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Places"]


@dataclass(frozen=True, slots=True)
class _Place:
    owner: Places
    path: str
    count: int
    task: asyncio.Task[Any] | None

    @property
    def key(self) -> str:
        return f"{self.path}.{self.count}" if self.path else str(self.count)


_here: ContextVar[_Place | None] = ContextVar("openagents_place", default=None)


class Places:
    """Gives out the call keys of one attempt."""

    def __init__(self) -> None:
        self._branches: defaultdict[str, int] = defaultdict(int)

    def begin(self, path: str = "") -> None:
        """The task that runs now is the trunk; calls in it are counted from 1."""
        _here.set(_Place(self, path, 0, asyncio.current_task()))

    def end(self) -> None:
        """The task that runs now makes no more calls; its place, which holds it, is forgotten."""
        _here.set(None)

    def enter(self) -> str:
        """The key of the call that starts now, in the task that runs now."""
        here = self._place()
        here = replace(here, count=here.count + 1)
        _here.set(here)
        return here.key

    def branch(self) -> str:
        """The path of the branch that runs now; '' is the pattern's own task."""
        return self._place().path

    @contextmanager
    def inside(self, key: str) -> Iterator[None]:
        """Calls made in here are calls inside the call `key`."""
        token = _here.set(_Place(self, f"{key}>", 0, asyncio.current_task()))
        try:
            yield
        finally:
            _here.reset(token)

    def _place(self) -> _Place:
        task = asyncio.current_task()
        here = _here.get()
        if here is None or here.owner is not self:
            here = _Place(
                self, "", 0, None
            )  # a task that was not started from the pattern: a branch of the start
        if here.task is not task:
            self._branches[here.key] += 1
            here = _Place(self, f"{here.key}/{self._branches[here.key]}", 0, task)
            _here.set(here)
        return here
