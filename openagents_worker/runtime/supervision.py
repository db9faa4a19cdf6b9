"""Supervision: the only place where a task waits for an attempt and an exception in it stops that attempt.

The waiting task belongs to the caller, for example to Celery's pool. It can be cancelled, or get the
exception of a time limit, at any moment. The attempt must then stop in order, and never in the middle of a
write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from openagents_worker.concurrency import any_done
from openagents_worker.errors import PatternError
from openagents_worker.runtime.call_ids import outside_runs
from openagents_worker.runtime.latch import Latch, LatchReason
from openagents_worker.runtime.marks import marked
from openagents_worker.runtime.user_code import RunCode, described

__all__ = ["Supervision"]

T = TypeVar("T")


class Supervision:
    """Waits for the tasks of one attempt."""

    def __init__(self, code: RunCode, latch: Latch) -> None:
        self._code = code
        self._latch = latch
        self.interruption: BaseException | None = None
        """What the waiting task got that is not an error, such as a cancellation. The runner raises it."""
        self.is_abandoned = False
        """Whether the attempt was interrupted while this worker still owned the run: it must be released."""

    async def wait(
        self, execution: asyncio.Task[Any], at_most_s: float | None, *others: asyncio.Future[Any]
    ) -> None:
        """Wait until the code of the run has ended, until the latch is set, until one of the other futures is
        done, or until the time is over."""
        try:
            await any_done(execution, self._latch.is_set, *others, at_most_s=at_most_s)
        except GeneratorExit:  # the event loop is being discarded
            execution.cancel()
            raise
        except BaseException as error:  # noqa: BLE001 - raised again by the runner
            self._note_interruption(error)

    async def uninterrupted(self, work: Callable[[], Coroutine[Any, Any, T]], *, name: str) -> T:
        """Execute a coroutine of the attempt. An exception in the waiting task does not interrupt it."""
        task = outside_runs(self._marked(work), name=f"{name} {self._code.run_id}")
        while not task.done():
            try:
                await any_done(task)
            except GeneratorExit:  # the event loop is being discarded
                task.cancel()
                raise
            except BaseException as error:  # noqa: BLE001 - raised again by the runner
                self._note_interruption(error)
        return task.result()

    async def _marked(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        marked.set(self._code.mark())
        return await self._code.marks.run_marked(work())

    def interrupt(self, by: BaseException) -> None:
        """Stop the attempt because its caller got an exception: Celery's soft time limit, or a
        cancellation."""
        if isinstance(by, Exception):
            error = PatternError(described(by), hint="the soft time limit of the Celery task is over")
            error.__cause__ = by
            self._latch.set(LatchReason.TIME_LIMIT, error=error)
        else:
            self.is_abandoned = self.is_abandoned or self._latch.reason is not LatchReason.FENCED
            self._latch.set(LatchReason.FENCED, detail="abandoned")

    def _note_interruption(self, error: BaseException) -> None:
        self.interrupt(error)
        if self.interruption is None and not isinstance(error, Exception):
            self.interruption = error
