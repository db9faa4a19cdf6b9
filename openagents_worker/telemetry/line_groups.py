"""Line groups. The only place that makes one line of the log of what one cause does to many runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from openagents_worker.errors import text_of

__all__ = ["LineGroups"]

TOGETHER_S = 3.0  # lines of many runs with one cause are one: about as long as runs take to stop
MAX_NAMED_RUNS = 5


class Log(Protocol):
    """Where lines are written; see `telemetry.EventLogger`."""

    name: str

    def write(self, level: int, event: str, /, **fields: Any) -> None: ...


@dataclass(slots=True)
class _Group:
    log: Log
    level: int
    event: str
    cause: dict[str, Any]
    run_ids: list[str] = field(default_factory=list)
    runs: int = 0


class LineGroups:
    """Lines that have one cause and meet many runs, until they are written as one.

    After an outage of Redis, a worker with forty runs would else say forty times that it lost one.
    """

    def __init__(self, after: Callable[[float, Callable[[], None]], object] | None = None) -> None:
        """`after(seconds, function)` calls the function once they have passed."""
        self._after = after or _call_in_thread
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._groups: dict[tuple[Any, ...], _Group] = {}

    def add(self, log: Log, level: int, event: str, run_id: str, cause: dict[str, Any]) -> None:
        """Note a line; the first one of a cause has it written soon, with all that came till then."""
        if (
            self._pid != os.getpid()
        ):  # a forked child: what waits is its parent's, as is the thread that waits
            self._begin()
        key = (log.name, level, event, *((name, text_of(value)) for name, value in sorted(cause.items())))
        with self._lock:
            group = self._groups.get(key)
            is_first = group is None
            if group is None:
                group = self._groups[key] = _Group(log, level, event, cause)
            group.runs += 1
            if len(group.run_ids) < MAX_NAMED_RUNS:
                group.run_ids.append(run_id)
        if is_first:
            self._after(TOGETHER_S, lambda: self._flush([key]))

    def flush(self) -> None:
        """Write what waits: the process ends, or somebody reads its log now."""
        with self._lock:
            keys = list(self._groups)
        self._flush(keys)

    def _flush(self, keys: Collection[tuple[Any, ...]]) -> None:
        with self._lock:
            groups = [group for key in keys if (group := self._groups.pop(key, None)) is not None]
        for group in groups:
            which: dict[str, Any] = {"run_id": group.run_ids[0]}
            if group.runs > 1:
                which = {"runs": group.runs, "run_ids": group.run_ids}
            group.log.write(group.level, group.event, **which, **group.cause)


def _call_in_thread(after_s: float, function: Callable[[], None]) -> None:
    timer = threading.Timer(after_s, function)
    timer.name, timer.daemon = "openagents-log", True
    try:
        timer.start()
    except RuntimeError:  # the process ends, and starts no thread any more
        function()
