"""Watchers. The only place that counts who follows a run's events in this process, and bounds it."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from openagents_worker.errors import TooManyWatchers

__all__ = ["check_room", "one_more"]

_opened: Counter[int] = Counter()  # by process: a forked child has none of its parent's
_counting = threading.Lock()


def check_room(most: int) -> None:
    """Raises `TooManyWatchers` where as many watchers as `OPENAGENTS_MAX_WATCHERS` allows are open."""
    if _opened[os.getpid()] >= most:
        raise TooManyWatchers(
            f"{most:,} watchers are open in this process, which is OPENAGENTS_MAX_WATCHERS",
            hint="try again later, or at another process; or set OPENAGENTS_MAX_WATCHERS higher",
        )


@contextmanager
def one_more(most: int) -> Iterator[None]:
    """One watcher more for as long as the block lasts. Raises `TooManyWatchers`."""
    process = os.getpid()
    with _counting:
        check_room(most)
        _opened[process] += 1
    try:
        yield
    finally:
        with _counting:
            _opened[process] -= 1
