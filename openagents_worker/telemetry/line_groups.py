"""Line groups. The only place that joins log lines that have the same cause and concern different runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from openagents_worker.errors import text_of

__all__ = ["LineGroups"]

GROUP_WINDOW_S = 3.0  # about the time in which all runs of a process stop after a failure
MAX_NAMED_RUNS = 5


class EventLog(Protocol):
    """A log to which lines are written, such as `telemetry.logs.EventLogger`."""

    name: str

    def write(self, level: int, event: str, /, **fields: Any) -> None: ...


@dataclass(slots=True)
class _Group:
    log: EventLog
    level: int
    event: str
    cause: dict[str, Any]
    run_ids: list[str] = field(default_factory=list)
    runs: int = 0


class LineGroups:
    """Collects log lines about runs that have the same cause, and writes one line for each cause.

    Otherwise a worker with forty runs would log forty lines after an outage of Redis.
    """

    def __init__(self, after: Callable[[float, Callable[[], None]], object] | None = None) -> None:
        """`after(seconds, function)` calls the function after that time. Default: in a thread."""
        self._after = after or _call_in_thread
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._groups: dict[tuple[Any, ...], _Group] = {}

    def add(self, log: EventLog, level: int, event: str, run_id: str, cause: dict[str, Any]) -> None:
        """Add a line about a run. The line of its group is written `GROUP_WINDOW_S` after the first one."""
        if self._pid != os.getpid():  # in a forked child: the groups and their timers belong to the parent
            self._reset()
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
            self._after(GROUP_WINDOW_S, lambda: self._flush([key]))

    def flush(self) -> None:
        """Write all groups now, for example because the process ends."""
        with self._lock:
            keys = list(self._groups)
        self._flush(keys)

    def _flush(self, keys: Collection[tuple[Any, ...]]) -> None:
        with self._lock:
            groups = [group for key in keys if (group := self._groups.pop(key, None)) is not None]
        for group in groups:
            runs: dict[str, Any] = {"run_id": group.run_ids[0]}
            if group.runs > 1:
                runs = {"runs": group.runs, "run_ids": group.run_ids}
            group.log.write(group.level, group.event, **runs, **group.cause)


def _call_in_thread(after_s: float, function: Callable[[], None]) -> None:
    timer = threading.Timer(after_s, function)
    timer.name, timer.daemon = "openagents-log", True
    try:
        timer.start()
    except RuntimeError:  # the interpreter is exiting and starts no threads any more
        function()
