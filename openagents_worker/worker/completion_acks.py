"""Completion acks: the only place that records, in batches, that Celery was notified of the end of runs.

Celery is the one recipient that is not served by `worker.outbox`: only a task of Celery can notify it.
"""

from __future__ import annotations

import asyncio
import os

from openagents_worker.errors import RedisUnreachable
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.scripts import confirm_completion
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.background import Health, Leave, background_task

__all__ = ["CompletionAcks"]

log = get_logger(__name__)

BATCH_DELAY_S = 0.01
MAX_ARGUMENTS = 2 * 200  # of one script call: 200 runs


class CompletionAcks:
    """Collects acks for `BATCH_DELAY_S`, then writes them with one script call.

    If the process dies before the write, the rescue loop notifies Celery again.
    """

    def __init__(self, store: AsyncStore, *, leave: Leave = os._exit) -> None:
        self._store = store
        self._leave = leave
        self._unwritten: list[str] = []  # run id, life, run id, life …
        self._writer: asyncio.Task[None] | None = None
        self.health = Health()

    def add(self, run_id: str, life: int) -> None:
        """Record that Celery was notified of the end of this life of the run. Call it on the loop."""
        self._unwritten += (run_id, str(life))
        if self._writer is None:
            self._writer = background_task(self._write(), name="completion-acks", leave=self._leave)

    async def aclose(self) -> None:
        """Return when all acks are written."""
        if self._writer is not None:
            await asyncio.shield(self._writer)  # a cancelled caller must not cancel the writer

    async def _write(self) -> None:
        """Write the acks in batches; a batch is dropped if Redis is unreachable."""
        await asyncio.sleep(BATCH_DELAY_S)
        try:
            while self._unwritten:
                batch, self._unwritten = self._unwritten[:MAX_ARGUMENTS], self._unwritten[MAX_ARGUMENTS:]
                try:
                    await self._store.run(confirm_completion(runs=batch))
                    self.health.succeeded()
                except RedisUnreachable as error:
                    self.health.failed(error)
                    log.warning("runs.told_again_later", runs=len(batch) // 2, error=error.message)
        finally:
            self._writer = None
