"""Background parts: the only place that defines what they are, and ends the process when one of them fails.

A worker whose heartbeat, watchdog or rescue loop has ended looks healthy but is not. Its process ends with
one log line that names the part and the error, and other workers reclaim its runs.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Protocol

from openagents_worker.telemetry.logs import get_logger, line_groups
from openagents_worker.worker.lease import boot_clock

__all__ = [
    "EX_PART_FAILED",
    "BackgroundPart",
    "Health",
    "HealthReport",
    "Leave",
    "ProcessControls",
    "background_task",
    "background_thread",
]

log = get_logger(__name__)

EX_PART_FAILED = 70  # EX_SOFTWARE of sysexits.h
MAX_ERROR_CHARS = 300  # of an error in a health report

Leave = Callable[[int], object]
"""Ends the process at once, with this exit code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessControls:
    """How a part ends its process, and the clock that it reads."""

    leave: Leave = os._exit
    clock: Callable[[], float] = boot_clock


class BackgroundPart(Protocol):
    """A part of a worker process that works beside the runs, from `start` to `stop`.

    Both are called once, never on the loop. `stop` returns when the part has ended, also if it was never
    started.
    """

    @property
    def name(self) -> str: ...

    @property
    def health(self) -> Health: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class HealthReport:
    """The health of a part at one moment. A round is one unit of its work, for example one heartbeat.

    `good_s_ago` and `error_s_ago` are None if there was no good round or no error. A part that only acts on
    events may be healthy although its last round was long ago.
    """

    rounds: int
    good_s_ago: float | None
    last_error: str | None
    error_s_ago: float | None

    @property
    def is_failing(self) -> bool:
        """Whether the last round has failed."""
        return self.error_s_ago is not None and (
            self.good_s_ago is None or self.error_s_ago < self.good_s_ago
        )


@dataclass(frozen=True, slots=True)
class _Rounds:
    count: int = 0
    good_at_s: float | None = None
    error: str | None = None
    error_at_s: float | None = None


class Health:
    """Records the last good round and the last error of one part. Read in any thread, written in one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rounds = _Rounds()

    def succeeded(self) -> None:
        """Record a good round."""
        rounds = self._rounds
        self._rounds = replace(rounds, count=rounds.count + 1, good_at_s=self._clock())

    def failed(self, error: BaseException | str) -> None:
        """Record a failed round. An exception is recorded with its type."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self._rounds = replace(self._rounds, error=text[:MAX_ERROR_CHARS], error_at_s=self._clock())

    def report(self) -> HealthReport:
        rounds, now_s = self._rounds, self._clock()

        def age(at_s: float | None) -> float | None:
            return None if at_s is None else round(now_s - at_s, 3)

        return HealthReport(rounds.count, age(rounds.good_at_s), rounds.error, age(rounds.error_at_s))


def background_thread(main: Callable[[], None], *, name: str, leave: Leave = os._exit) -> threading.Thread:
    """A daemon thread, not started yet, that ends the process when `main` raises."""

    def run_guarded() -> None:
        try:
            main()
        except BaseException as error:  # noqa: BLE001 - after any exception the part has ended
            _end_process(name, error, leave)

    return threading.Thread(target=run_guarded, name=name, daemon=True)


def background_task(
    work: Coroutine[Any, Any, Any], *, name: str, leave: Leave = os._exit
) -> asyncio.Task[Any]:
    """A task that ends the process when it raises. A cancellation is not a failure."""

    def on_done(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _end_process(name, error, leave)

    task = asyncio.get_running_loop().create_task(work, name=name)
    task.add_done_callback(on_done)
    return task


def _end_process(part: str, error: BaseException, leave: Leave) -> None:
    """Log the failed part and end the process."""
    problem = f"{type(error).__name__}: {error}"
    log.error("worker.part_failed", part=part, error=problem, exit_code=EX_PART_FAILED, exc_info=error)
    line_groups.flush()
    leave(EX_PART_FAILED)
