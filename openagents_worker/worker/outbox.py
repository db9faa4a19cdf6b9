"""The outbox: the only place that notifies recipients of the end of runs, at least once each.

A recipient is something outside that must be notified of every end. Celery is one: it is notified by a
message of the run, which is sent again until a worker has recorded the notification (`completion_acks`). All
others are served here. The script that ends a run puts the end into the outbox of each recipient. A worker
takes it from there, delivers it and removes it. If the worker dies in between or the delivery fails, the end
is due again.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from openagents_worker.concurrency import end_task
from openagents_worker.errors import OpenAgentsError
from openagents_worker.runtime.user_code import is_runtime_signal
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.scripts import RunEnd, outbox_done, outbox_take
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.background import Health, Leave, background_task

__all__ = ["Outbox", "OutboxLimits", "Recipient", "Recipients"]

log = get_logger(__name__)


class Recipient(Protocol):
    """Something outside that is notified of the end of every run. `name` must not change between versions."""

    @property
    def name(self) -> str: ...

    async def deliver(self, end: RunEnd) -> None:
        """Notify the recipient; it may be notified of the same end again. Any exception means a new try, also
        one with which the recipient would end its task or the process."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxLimits:
    """The limits of the outbox of one recipient; see `outbox_take` for `retry_s` and `max_retry_s`.

    `deliver_s` is shorter than `retry_s`, so that a slow delivery is not begun twice. With the default limits
    an end is given up after about six days.
    """

    poll_s: float = 1.0
    deliver_s: float = 30.0
    retry_s: float = 60.0
    max_retry_s: float = 3_600.0
    max_tries: int = 150
    batch: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipients:
    """The recipients that a worker serves, besides Celery, and the limits of their outboxes."""

    all: tuple[Recipient, ...] = ()
    limits: OutboxLimits = OutboxLimits()

    def __post_init__(self) -> None:
        if len({recipient.name for recipient in self.all}) < len(self.all):
            raise ValueError("two recipients have the same name")


class Outbox:
    """Serves the recipients, each in a task of its own: one that fails or hangs does not delay the others."""

    def __init__(
        self,
        store: AsyncStore,
        recipients: Recipients,
        *,
        leave: Leave = os._exit,
    ) -> None:
        self._store = store
        self._recipients = recipients.all
        self._limits = recipients.limits
        self._leave = leave
        self._tasks: list[asyncio.Task[NoReturn]] = []
        self.health = Health()

    async def start(self) -> None:
        """Begin to serve the recipients. Every run that ends from the first round on is delivered to them."""
        for recipient in self._recipients:
            task = background_task(self._serve(recipient), name=f"outbox {recipient.name}", leave=self._leave)
            self._tasks.append(task)

    async def aclose(self) -> None:
        """End. Deliveries that are interrupted are repeated by another worker."""
        for task in self._tasks:
            await end_task(task)

    async def _serve(self, recipient: Recipient) -> NoReturn:
        """Deliver what is due, for ever."""
        while True:
            pause_s = self._limits.poll_s
            try:
                next_s = await self._deliver_due(recipient)
                self.health.succeeded()
                pause_s = pause_s if next_s is None else min(pause_s, next_s)
            except OpenAgentsError as error:  # Redis is unreachable, or refuses
                self.health.failed(error)
                log.warning("outbox.not_read", recipient=recipient.name, code=error.code, error=error.message)
            await asyncio.sleep(pause_s)

    async def _deliver_due(self, recipient: Recipient) -> float | None:
        """Deliver one batch; returns the seconds until the next end is due."""
        limits = self._limits
        taken = await self._store.run(
            outbox_take(
                recipient=recipient.name,
                limit=limits.batch,
                retry_ms=round(limits.retry_s * 1000),
                max_retry_ms=round(limits.max_retry_s * 1000),
            )
        )
        ends = taken.ends
        done = await asyncio.gather(*(self._is_done(recipient, end) for end in ends))
        words = [
            word
            for end, is_done in zip(ends, done, strict=True)
            if is_done
            for word in (end.run_id, str(end.life))
        ]
        if words:
            await self._store.run(outbox_done(recipient=recipient.name, ends=words))
        if len(ends) == limits.batch:
            return 0.0
        return None if taken.next_ms is None else taken.next_ms / 1000

    async def _is_done(self, recipient: Recipient, end: RunEnd) -> bool:
        """Deliver one end. Returns whether it must leave the outbox: delivered, or given up."""
        try:
            async with asyncio.timeout(self._limits.deliver_s):
                await recipient.deliver(end)
        except BaseException as error:
            if is_runtime_signal(error):
                raise
            problem = f"{type(error).__name__}: {error}"
            self.health.failed(f"{recipient.name}: {problem}", code=type(error).__name__)
            where: dict[str, Any] = {"recipient": recipient.name, "run_id": end.run_id, "tries": end.tries}
            if end.tries < self._limits.max_tries:
                log.of_run(
                    logging.WARNING,
                    "outbox.not_delivered",
                    run_id=end.run_id,
                    recipient=recipient.name,
                    error=problem,
                )
                return False
            log.error("outbox.given_up", **where, error=problem)
        return True
