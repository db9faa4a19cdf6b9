"""Flower repair: the only place that corrects the state that Flower shows after events in the wrong order.

Celery sends `task-retried` after a run was suspended. If another process cancels or ends the run at that
moment, its event may arrive first. Flower lets a retry replace every final state, so the task would show
RETRY for ever.
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
from openagents_worker.worker.background import Health, Leave, background_task

__all__ = ["FlowerRepair"]

log = get_logger(__name__)

CHECK_AFTER_S = 3 * BATCH_S  # by then the retry event was published


class FlowerRepair:
    """Checks each suspended run once; if the run has ended, the event of its end is sent again."""

    def __init__(self, store: AsyncStore, *, leave: Leave = os._exit) -> None:
        self._store = store
        self._leave = leave
        self._checks: set[asyncio.Task[None]] = set()
        self.health = Health()

    def check_later(self, app: Celery, hostname: str, run_id: str) -> None:
        """Schedule the check of a run for which Celery is about to send `task-retried`. Call it on the loop.

        `hostname` is the Celery node name that the repeated event names.
        """
        check = background_task(
            self._check(app, hostname, run_id), name=f"flower repair {run_id}", leave=self._leave
        )
        self._checks.add(check)
        check.add_done_callback(self._checks.discard)

    async def aclose(self) -> None:
        """Cancel the checks that are not done yet."""
        for check in list(self._checks):
            await end_task(check)

    async def _check(self, app: Celery, hostname: str, run_id: str) -> None:
        """Send the event of the end again if the run has ended."""
        await asyncio.sleep(CHECK_AFTER_S)
        try:
            state = (await aread_states(self._store, [run_id]))[run_id]
            if state is not None and state in END_EVENTS:
                name, fields = END_EVENTS[state]
                await asyncio.to_thread(_send_event, app, hostname, name, {"uuid": run_id, **fields})
            self.health.succeeded()
        except RedisUnreachable as error:
            self.health.failed(error)
            log.of_run(logging.WARNING, "row.not_mended", run_id=run_id, error=error.message)
        except Exception as error:  # noqa: BLE001 - each broker library has its own errors
            self.health.failed(error)
            log.of_run(logging.WARNING, "row.not_mended", run_id=run_id, error=type(error).__name__)


def _send_event(app: Celery, hostname: str, name: str, fields: dict[str, Any]) -> None:
    with app.events.default_dispatcher(hostname=hostname) as dispatcher:
        dispatcher.send(name, **fields)
