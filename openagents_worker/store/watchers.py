"""Watchers: the only place that counts and limits the watchers of events in this process."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from openagents_worker.errors import TooManyWatchers

__all__ = ["check_watcher_limit", "counted_watcher"]

_open_watchers: Counter[int] = Counter()  # by process id: a forked child starts at 0
_lock = threading.Lock()


def check_watcher_limit(limit: int) -> None:
    """Raises `TooManyWatchers` if this process has `limit` open watchers (`OPENAGENTS_MAX_WATCHERS`)."""
    if _open_watchers[os.getpid()] >= limit:
        raise TooManyWatchers(
            f"this process already has {limit:,} open watchers, the limit of OPENAGENTS_MAX_WATCHERS",
            hint="try again later or in another process, or increase OPENAGENTS_MAX_WATCHERS",
        )


@contextmanager
def counted_watcher(limit: int) -> Iterator[None]:
    """Count one watcher for the duration of the block. Raises `TooManyWatchers` at the limit."""
    process = os.getpid()
    with _lock:
        check_watcher_limit(limit)
        _open_watchers[process] += 1
    try:
        yield
    finally:
        with _lock:
            _open_watchers[process] -= 1
