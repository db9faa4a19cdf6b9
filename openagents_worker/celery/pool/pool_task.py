"""Pool tasks: the only place that executes one message in our pool, stops it and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.exceptions import SoftTimeLimitExceeded
from greenlet import GreenletExit

from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.loop_thread import SyncBody, drive

__all__ = ["PoolTask", "PoolRequest", "StopCause"]

log = get_logger(__name__)


class StopCause(StrEnum):
    """Why a pool task was ended from outside. Celery itself reports the end."""

    TERMINATED = "terminated"  # revoked, or the worker must stop at once
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """A call of Celery's tracer that Celery requests from the pool, with its callbacks. Limits in seconds."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    on_loop: bool
    callback: Callable[[Any], Any] | None = None
    accept_callback: Callable[[int, float], Any] | None = None
    error_callback: Callable[[Any], Any] | None = None
    timeout_callback: Callable[[bool, float], Any] | None = None
    timeout: float | None = None
    soft_timeout: float | None = None


class PoolTask:
    """A `PoolRequest` that waits or is executed, on the loop or in a thread."""

    def __init__(self, number: int, request: PoolRequest, *, loop: asyncio.AbstractEventLoop) -> None:
        self.number = number
        self.request = request
        self.stopped: StopCause | None = None
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._body: SyncBody | None = None
        self._callback_tasks: set[asyncio.Task[None]] = set()

    def terminate(self, signal: int | None = None) -> None:
        """End the task. Called by Celery's request, which reports the revocation itself. Thread-safe.

        A task that is terminated while it waits is still accepted first, so that Celery records its
        revocation.
        """
        self._stop(StopCause.TERMINATED)

    async def execute(self, threads: Executor) -> None:
        """Execute the task within its time limits."""
        limits = self._limits()
        try:
            if self.request.on_loop:
                await self._on_loop()
            else:
                await self._loop.run_in_executor(threads, self._trace)
        finally:
            for limit in limits:
                limit.cancel()
            for callback_task in self._callback_tasks:
                await asyncio.wait([callback_task])
            self._task = self._body = None  # breaks a reference cycle: the body refers to this object

    async def _on_loop(self) -> None:
        """Drive the body on the loop."""
        self._task, self._body = asyncio.current_task(), SyncBody(self._trace)
        with contextlib.suppress(asyncio.CancelledError):  # it was stopped
            await drive(self._body)

    def _trace(self) -> None:
        """Call the accept callback, Celery's tracer and the result callback. All of them are synchronous."""
        request = self.request
        if request.accept_callback is not None:
            request.accept_callback(self.number, time.monotonic())
        if self.stopped is not None:
            return
        try:
            outcome = request.target(*request.args, **request.kwargs)
        except GreenletExit:
            raise
        except BaseException:  # noqa: BLE001 - a SystemExit of a task must not end the process
            self._call_back(request.error_callback, ExceptionInfo())
        else:
            self._call_back(request.callback, outcome)

    def _call_back(self, callback: Callable[[Any], Any] | None, result: Any) -> None:
        if callback is None or self.stopped is not None:
            return  # Celery has already reported the end
        try:
            callback(result)
        except BaseException:  # Celery re-raises a SystemExit of the task here
            log.exception("job.not_told", job=self.request.name)

    # --- stopping ----------------------------------------------------------------------------------------

    def _limits(self) -> list[asyncio.TimerHandle]:
        """Start the timers of the time limits."""
        limits = ((self.request.soft_timeout, self._soft_limit), (self.request.timeout, self._hard_limit))
        return [self._loop.call_later(limit_s, reached, limit_s) for limit_s, reached in limits if limit_s]

    def _soft_limit(self, limit_s: float) -> None:
        """Raise `SoftTimeLimitExceeded` where the body waits; the body may still clean up."""
        if self.stopped is None:
            self._call_timeout_callback(True, limit_s)
            self._interrupt(SoftTimeLimitExceeded(limit_s))

    def _hard_limit(self, limit_s: float) -> None:
        if self.stopped is None:
            self._call_timeout_callback(False, limit_s)
            self._stop(StopCause.TIME_LIMIT)

    def _call_timeout_callback(self, soft: bool, limit_s: float) -> None:
        if (callback := self.request.timeout_callback) is not None:
            # The callback of a hard limit stores a failure: in its own body it does not block the loop.
            body = SyncBody(lambda: callback(soft, limit_s))
            self._callback_tasks.add(
                self._loop.create_task(_execute(body), name=f"limit of {self.request.name}")
            )

    def _stop(self, why: StopCause) -> None:
        self.stopped = self.stopped or why
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._interrupt, None)

    def _interrupt(self, interruption: BaseException | None) -> None:
        """Interrupt the body on the loop. A body in a thread continues, but its result is dropped."""
        if self._task is not None and self._body is not None:
            self._body.interruption = interruption
            self._task.cancel()


async def _execute(body: SyncBody) -> None:
    await drive(body)
