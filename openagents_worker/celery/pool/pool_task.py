"""A job: one message's work in our pool. The only place that says how it runs, is told to stop and ends."""

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

__all__ = ["PoolRequest", "PoolTask", "Stop"]

log = get_logger(__name__)


class Stop(StrEnum):
    """Why a job is ended from outside. What Celery tells the world of it, Celery tells itself."""

    TERMINATED = "terminated"  # revoked, or the worker stops at once
    TIME_LIMIT = "time_limit"


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """What Celery wants of the pool: its tracer called, and to be told. Limits are in seconds."""

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
    """An order being carried out, on the loop or in a thread."""

    def __init__(self, number: int, order: PoolRequest, *, loop: asyncio.AbstractEventLoop) -> None:
        self.number = number
        self.order = order
        self.stopped: Stop | None = None
        self._loop = loop
        self._task: asyncio.Task[None] | None = None
        self._body: SyncBody | None = None
        self._telling: set[asyncio.Task[None]] = set()

    def terminate(self, signal: int | None = None) -> None:
        """Celery's request asks for it, from any thread; it tells of the revocation itself.

        A job that waits for its turn is not forgotten: it ends when it is accepted, so that it is told of.
        """
        self._stop(Stop.TERMINATED)

    async def execute(self, threads: Executor) -> None:
        """Carry the job out, on the loop or in a thread, within its limits."""
        limits = self._limits()
        try:
            if self.order.on_loop:
                await self._on_loop()
            else:
                await self._loop.run_in_executor(threads, self._perform)
        finally:
            for limit in limits:
                limit.cancel()
            for telling in self._telling:
                await asyncio.wait([telling])
            self._task = self._body = None  # the body holds the job: both would be the collector's work

    async def _on_loop(self) -> None:
        self._task, self._body = asyncio.current_task(), SyncBody(self._perform)
        with contextlib.suppress(asyncio.CancelledError):  # told to stop, and it has
            await drive(self._body)

    def _perform(self) -> None:
        """Accept, trace, tell; all of it synchronous, as Celery is."""
        order = self.order
        if order.accept_callback is not None:
            order.accept_callback(self.number, time.monotonic())
        if self.stopped is not None:
            return
        try:
            outcome = order.target(*order.args, **order.kwargs)
        except GreenletExit:
            raise
        except BaseException:  # noqa: BLE001 - a task's SystemExit is not the process's
            self._tell(order.error_callback, ExceptionInfo())
        else:
            self._tell(order.callback, outcome)

    def _tell(self, callback: Callable[[Any], Any] | None, what: Any) -> None:
        if callback is None or self.stopped is not None:
            return  # its end has been told
        try:
            callback(what)
        except BaseException:  # Celery re-raises a SystemExit of the task's here
            log.exception("job.not_told", job=self.order.name)

    # --- being stopped -----------------------------------------------------------------------------------

    def _limits(self) -> list[asyncio.TimerHandle]:
        limits = ((self.order.soft_timeout, self._soft_limit), (self.order.timeout, self._hard_limit))
        return [self._loop.call_later(limit_s, reached, limit_s) for limit_s, reached in limits if limit_s]

    def _soft_limit(self, limit_s: float) -> None:
        """The body meets `SoftTimeLimitExceeded` where it waits, and may still tidy up."""
        if self.stopped is None:
            self._tell_of_limit(True, limit_s)
            self._interrupt(SoftTimeLimitExceeded(limit_s))

    def _hard_limit(self, limit_s: float) -> None:
        if self.stopped is None:
            self._tell_of_limit(False, limit_s)
            self._stop(Stop.TIME_LIMIT)

    def _tell_of_limit(self, soft: bool, limit_s: float) -> None:
        if (told := self.order.timeout_callback) is not None:
            # A hard limit stores a failure: in a body of its own it does not block the loop.
            body = SyncBody(lambda: told(soft, limit_s))
            self._telling.add(self._loop.create_task(_execute(body), name=f"limit of {self.order.name}"))

    def _stop(self, why: Stop) -> None:
        self.stopped = self.stopped or why
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._interrupt, None)

    def _interrupt(self, by: BaseException | None) -> None:
        """A job in a thread cannot be interrupted: it goes on; once stopped, what it returns is dropped."""
        if self._task is not None and self._body is not None:
            self._body.interruption = by
            self._task.cancel()


async def _execute(body: SyncBody) -> None:
    await drive(body)
