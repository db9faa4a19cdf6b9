"""Stopping: the only place that ends the code of a run that must not continue, or has left tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from openagents_worker.runtime.latch import Latch, LatchReason
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.user_code import RunCode
from openagents_worker.settings import Settings
from openagents_worker.telemetry.logs import get_logger, line_groups

__all__ = ["EX_DOES_NOT_STOP", "CodeStopper"]

log = get_logger(__name__)

EX_DOES_NOT_STOP = 70  # EX_SOFTWARE of sysexits.h
MAX_NAMED = 5  # of the tasks that a run has left
LEFT_HINT = "await or cancel them; open a client of several runs outside of runs (docs/pools.md)"


class CodeStopper:
    """Stops the code of one attempt whose latch is set, or whose program has ended."""

    def __init__(
        self, code: RunCode, latch: Latch, settings: Settings, leave: Callable[[int], object]
    ) -> None:
        """`leave(exit_code)` ends the process when the code cannot be stopped."""
        self._code = code
        self._latch = latch
        self._settings = settings
        self._leave = leave

    async def stop(self, execution: asyncio.Task[Any], recorder: Recorder | None) -> None:
        """Stop all code of the run. Calls that may still end are recorded first; the rest is cancelled.

        If code does not stop within the grace period, the process exits: the next run of the session must
        not execute beside it.
        """
        if recorder is not None and self._latch.lets_calls_end:
            await self._let_calls_end(recorder)
        if recorder is not None:
            await recorder.in_progress.wait_for_blocking(self._grace_s / 3)
        began_s = time.monotonic()
        if recorder is not None and self._is_outcome_wanted(recorder):
            await self._let_calls_end(recorder, at_most_s=self._grace_s / 3)
        if await self._cancel_all(execution, recorder, began_s):
            _retrieve_exceptions({execution})
        else:
            self._exit()

    async def stop_left(self, execution: asyncio.Task[Any], recorder: Recorder | None) -> None:
        """The program has ended and has left tasks: cancel them, as `asyncio.run` does, and wait for them.

        Calls with effects that are in progress may end before, and are recorded: a later life of the run
        would have to ask a person about them. No other call begins. What does not stop within the grace
        period continues without calls, because the process has other runs.
        """
        names = self.in_progress()["tasks"][:MAX_NAMED]
        run_id, agent_id = self._code.run_id, self._code.agent_id
        log.warning("run.tasks_left", run_id=run_id, agent_id=agent_id, tasks=names, hint=LEFT_HINT)
        if recorder is not None:
            recorder.in_progress.close()
            if not recorder.in_progress.may_repeat():
                await self._let_calls_end(recorder, at_most_s=self._grace_s / 3)
        if not await self._cancel_all(execution, recorder, time.monotonic()):
            log.error("run.code_left", after_s=self._grace_s, **self.in_progress())

    async def _cancel_all(
        self, execution: asyncio.Task[Any], recorder: Recorder | None, began_s: float
    ) -> bool:
        """Cancel the code of the run again and again until nothing of it executes. False: it still does after
        the grace period."""
        pause_limit_s = self._settings.time_limits.cancel_grace_s / 3  # a pattern may swallow a cancellation
        while self._executes(execution):
            left_s = self._grace_s - (time.monotonic() - began_s)
            if left_s <= 0:
                return False
            if recorder is not None:
                recorder.in_progress.cancel()
            tasks = self._unfinished_tasks(execution)
            for task in tasks:
                task.cancel()
            pause_s = min(left_s, pause_limit_s)
            if tasks:
                done, _ = await asyncio.wait(tasks, timeout=pause_s)
                _retrieve_exceptions(done)
            else:
                await self._code.off_loop.wait(pause_s)
        return True

    def in_progress(self) -> dict[str, Any]:
        """The code of the run that still executes: fields of a log line."""
        return {
            "run_id": self._code.run_id,
            "agent_id": self._code.agent_id,
            "in_threads": self._code.off_loop.names(),
            "tasks": sorted(task.get_name() for task in self._code.tasks()),
        }

    def _is_outcome_wanted(self, recorder: Recorder) -> bool:
        """Whether another worker would have to ask a person about a call that this one is making."""
        return self._latch.reason is LatchReason.FENCED and not recorder.in_progress.may_repeat()

    async def _let_calls_end(self, recorder: Recorder, at_most_s: float | None = None) -> None:
        """Wait until no call can end by itself any more, or until the latch says that calls must stop.

        With `at_most_s`, only this time limits the wait.
        """
        run_id = self._code.run_id
        quiet = asyncio.create_task(recorder.in_progress.wait(), name=f"quiet {run_id}")
        stopping = self._latch.wait_stop_now() if at_most_s is None else asyncio.sleep(at_most_s)
        stop_now = asyncio.create_task(stopping, name=f"stop {run_id}")
        await asyncio.wait({quiet, stop_now}, return_when=asyncio.FIRST_COMPLETED)
        quiet.cancel()
        stop_now.cancel()

    def _executes(self, execution: asyncio.Task[Any]) -> bool:
        """Whether code of the run still executes that must stop before the attempt ends.

        A run that is retried keeps its session, so a thread of a timed-out call may continue.
        """
        waits_for_threads = self._latch.reason is not LatchReason.RETRY
        return bool(self._unfinished_tasks(execution) or (waits_for_threads and self._code.off_loop.names()))

    def _unfinished_tasks(self, execution: asyncio.Task[Any]) -> set[asyncio.Task[Any]]:
        """The tasks of the run that have not ended, including `execution` if it has not."""
        return {task for task in self._code.tasks() | {execution} if not task.done()}

    @property
    def _grace_s(self) -> float:
        """Seconds that code of the run has to stop. Shorter if another worker may own the run."""
        if self._latch.reason is LatchReason.FENCED:
            return min(self._settings.time_limits.cancel_grace_s, self._settings.stop_grace_s)
        return self._settings.stop_grace_s

    def _exit(self) -> None:
        """Log what does not stop and end the process."""
        log.error(
            "run.does_not_stop",
            reason=str(self._latch.reason),
            after_s=self._grace_s,
            exit_code=EX_DOES_NOT_STOP,
            **self.in_progress(),
        )
        line_groups.flush()
        self._leave(EX_DOES_NOT_STOP)
        # If `leave` returns, as in tests.
        self._latch.set(LatchReason.FENCED, detail="its code does not stop")


def _retrieve_exceptions(tasks: set[asyncio.Task[Any]]) -> None:
    """Retrieve the exceptions of stopped tasks, so that asyncio does not log them. The latch decides how
    the run continues."""
    for task in tasks:
        if not task.cancelled():
            task.exception()
