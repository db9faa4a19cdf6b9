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

from openagents_worker.errors import OpenAgentsError, text_of
from openagents_worker.store.part_health import PartProblem, PartState
from openagents_worker.telemetry.logs import get_logger, line_groups
from openagents_worker.worker.lease import boot_clock

__all__ = [
    "EX_PART_FAILED",
    "LATE_AFTER_S",
    "UNAVAILABLE",
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
LATE_AFTER_S = 30.0  # parts that work by the clock have a round in a second or two, also on a busy machine
RECENT_S = 600.0  # a part that works again is reported for so long after its last error
UNAVAILABLE = "unavailable"
"""The code of a part that cannot work on this system. Its worker logs this when it starts."""

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
    events may be healthy although its last round was long ago. `failures` counts failed rounds since the last
    good one, and `failing_s` is the time since the first of them. `late_s` is the time since the last round
    of a part whose next round is overdue.
    """

    rounds: int
    good_s_ago: float | None
    last_error: str | None
    error_s_ago: float | None
    error_code: str | None = None
    failures: int = 0
    failing_s: float | None = None
    late_s: float | None = None

    @property
    def is_failing(self) -> bool:
        """Whether the last round has failed."""
        return self.error_s_ago is not None and (
            self.good_s_ago is None or self.error_s_ago < self.good_s_ago
        )

    def problem(self, part: str) -> PartProblem | None:
        """What other processes should know about this part; None if it works and has worked for minutes."""
        code = self.error_code or ""
        if code == UNAVAILABLE:
            return None
        if self.failing_s is not None:
            return PartProblem(part, PartState.FAILING, self.failing_s, self.failures, code)
        if self.late_s is not None:
            return PartProblem(part, PartState.LATE, self.late_s, 0, code)
        if self.error_s_ago is not None and self.error_s_ago < RECENT_S:
            return PartProblem(part, PartState.RECOVERED, self.error_s_ago, 0, code)
        return None


@dataclass(frozen=True, slots=True)
class _Rounds:
    count: int = 0
    good_at_s: float | None = None
    error: str | None = None
    error_at_s: float | None = None
    code: str | None = None
    failures: int = 0
    failing_since_s: float | None = None


class Health:
    """Records the last good round and the last error of one part. Read in any thread, written in one."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, late_after_s: float | None = None
    ) -> None:
        """`late_after_s`: the part is late so long after its last round. None: it only acts on events."""
        self._clock = clock
        self._late_after_s = late_after_s
        self._rounds = _Rounds()

    def succeeded(self) -> None:
        """Record a good round."""
        rounds = self._rounds
        self._rounds = replace(
            rounds, count=rounds.count + 1, good_at_s=self._clock(), failures=0, failing_since_s=None
        )

    def failed(self, error: BaseException | str, *, code: str | None = None) -> None:
        """Record a failed round. An exception is recorded with its type, and with its code if it has one."""
        rounds, now_s = self._rounds, self._clock()
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self._rounds = replace(
            rounds,
            error=text[:MAX_ERROR_CHARS],
            error_at_s=now_s,
            code=code or _code_of(error),
            failures=rounds.failures + 1,
            failing_since_s=now_s if rounds.failing_since_s is None else rounds.failing_since_s,
        )

    def report(self) -> HealthReport:
        rounds, now_s = self._rounds, self._clock()

        def age(at_s: float | None) -> float | None:
            return None if at_s is None else round(now_s - at_s, 3)

        good_s_ago, error_s_ago = age(rounds.good_at_s), age(rounds.error_at_s)
        last_s_ago = min((one for one in (good_s_ago, error_s_ago) if one is not None), default=0.0)
        is_late = self._late_after_s is not None and last_s_ago > self._late_after_s
        return HealthReport(
            rounds.count,
            good_s_ago,
            rounds.error,
            error_s_ago,
            error_code=rounds.code,
            failures=rounds.failures,
            failing_s=age(rounds.failing_since_s),
            late_s=last_s_ago if is_late else None,
        )


def _code_of(error: BaseException | str) -> str | None:
    if isinstance(error, str):
        return None
    return text_of(error.code) if isinstance(error, OpenAgentsError) else type(error).__name__


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
