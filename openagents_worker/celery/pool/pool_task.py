"""Pool tasks: the only place that executes one message in our pool, stops it and ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
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
        self._body: SyncBody | None = None
        self._task: asyncio.Task[Any] | None = None
        self._limits: list[asyncio.TimerHandle] = []
        self._callbacks: set[asyncio.Task[None]] = set()

    def terminate(self, signal: int | None = None) -> None:
        """End the task. Called by Celery's request, which reports the revocation itself. Thread-safe.

        A task that is terminated while it waits is still accepted first, so that Celery records its
        revocation.
        """
        self._stop(StopCause.TERMINATED)

    def begin(self) -> SyncBody | None:
        """Start the time limits. Returns the body that the loop drives; None for a task that needs a thread.

        Must be called on the loop's thread.
        """
        limits = ((self.request.soft_timeout, self._soft_limit), (self.request.timeout, self._hard_limit))
        self._limits = [
            self._loop.call_later(limit_s, reached, limit_s) for limit_s, reached in limits if limit_s
        ]
        self._body = SyncBody(self.execute) if self.request.on_loop else None
        return self._body

    def close(self) -> None:
        """Release what the task holds, after its end."""
        for limit in self._limits:
            limit.cancel()
        self._task = self._body = None  # breaks a reference cycle: the body refers to this object

    def unfinished_callback(self) -> asyncio.Task[None] | None:
        """A callback of a time limit that still executes."""
        return next((callback for callback in self._callbacks if not callback.done()), None)

    def execute(self) -> None:
        """Call the accept callback, Celery's tracer and the result callback. All of them are synchronous."""
        if self._body is not None:
            self._task = asyncio.current_task()
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
            self._callbacks.add(self._loop.create_task(drive(body), name=f"limit of {self.request.name}"))

    def _stop(self, why: StopCause) -> None:
        self.stopped = self.stopped or why
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._interrupt, None)

    def _interrupt(self, interruption: BaseException | None) -> None:
        """Interrupt the body on the loop. A body in a thread continues, but its result is dropped."""
        if self._task is not None and self._body is not None:
            self._body.interruption = interruption
            self._task.cancel()
