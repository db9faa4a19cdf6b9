"""The only place that starts background threads and tasks, and ends the process when one of them fails.

A worker whose heartbeat, watchdog or rescue loop has on_done looks healthy but is not. Its process ends with
one log line that names the part and the error, and other workers reclaim its runs.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from openagents_worker.telemetry.logs import get_logger, line_groups

__all__ = ["EX_PART_FAILED", "Leave", "background_task", "background_thread"]

log = get_logger(__name__)

EX_PART_FAILED = 70  # EX_SOFTWARE of sysexits.h

Leave = Callable[[int], object]
"""Ends the process at once, with this exit code."""


def background_thread(main: Callable[[], None], *, name: str, leave: Leave = os._exit) -> threading.Thread:
    """A daemon thread, not started yet, that ends the process when `main` raises."""

    def run_guarded() -> None:
        try:
            main()
        except BaseException as error:  # noqa: BLE001 - after any exception the part has on_done
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
