"""Rows. The only place that mends what Flower shows of a run whose events came out of order.

`task-retried` is sent once the run is put aside. Whoever cancels or takes it at that moment may be heard
first, and Celery lets a retry overrule every end: the row would say RETRY for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from celery import Celery

from openagents_worker.celery.task_events import BATCH_S
from openagents_worker.celery.task_state import END_EVENTS
from openagents_worker.concurrency import end_task
from openagents_worker.errors import RedisUnreachable
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.records import aread_states
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.background import Leave, background_task

__all__ = ["FlowerRepair"]

log = get_logger(__name__)

LOOK_AFTER_S = 3 * BATCH_S  # by then the retry was published


class FlowerRepair:
    """Looks once at each run that was put aside; an end that it finds is told once more."""

    def __init__(self, store: AsyncStore, *, leave: Leave = os._exit) -> None:
        self._store = store
        self._leave = leave
        self._looks: set[asyncio.Task[None]] = set()

    def put_aside(self, app: Celery, hostname: str, run_id: str) -> None:
        """The worker of that name is about to tell Celery that the run is retried; call it on the loop."""
        look = background_task(self._look(app, hostname, run_id), name=f"row {run_id}", leave=self._leave)
        self._looks.add(look)
        look.add_done_callback(self._looks.discard)

    async def aclose(self) -> None:
        """Leave what was not looked at yet."""
        for look in list(self._looks):
            await end_task(look)

    async def _look(self, app: Celery, hostname: str, run_id: str) -> None:
        await asyncio.sleep(LOOK_AFTER_S)
        try:
            state = (await aread_states(self._store, [run_id]))[run_id]
            if state is not None and state in END_EVENTS:
                name, fields = END_EVENTS[state]
                await asyncio.to_thread(_send, app, hostname, name, {"uuid": run_id, **fields})
        except RedisUnreachable as error:
            log.of_run(logging.WARNING, "row.not_mended", run_id=run_id, error=error.message)
        except Exception as error:  # noqa: BLE001 - every broker has errors of its own
            log.of_run(logging.WARNING, "row.not_mended", run_id=run_id, error=type(error).__name__)


def _send(app: Celery, hostname: str, name: str, fields: dict[str, Any]) -> None:
    with app.events.default_dispatcher(hostname=hostname) as dispatcher:
        dispatcher.send(name, **fields)
