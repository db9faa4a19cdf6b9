"""Tellings. The only place that notes, for many runs together, that Celery was told how they ended."""

from __future__ import annotations

import asyncio
import os

from openagents_worker.errors import RedisUnreachable
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.scripts import confirm_completion
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.background import Leave, background_task

__all__ = ["CompletionAcks"]

log = get_logger(__name__)

TOGETHER_S = 0.01
MOST_WORDS = 2 * 200  # a script call


class CompletionAcks:
    """Writes down at once what was told within a moment. Who dies in that moment tells again."""

    def __init__(self, store: AsyncStore, *, leave: Leave = os._exit) -> None:
        self._store = store
        self._leave = leave
        self._waiting: list[str] = []  # run id, life, run id, life …
        self._writing: asyncio.Task[None] | None = None

    def add(self, run_id: str, life: int) -> None:
        """Celery was told of the end of this life; call it on the loop."""
        self._waiting += (run_id, str(life))
        if self._writing is None:
            self._writing = background_task(self._write(), name="tellings", leave=self._leave)

    async def aclose(self) -> None:
        """Returns when all is written."""
        if self._writing is not None:
            await self._writing

    async def _write(self) -> None:
        await asyncio.sleep(TOGETHER_S)
        try:
            while self._waiting:
                these, self._waiting = self._waiting[:MOST_WORDS], self._waiting[MOST_WORDS:]
                try:
                    await self._store.run(confirm_completion(runs=these))
                except RedisUnreachable as error:
                    log.warning("runs.told_again_later", runs=len(these) // 2, error=error.message)
        finally:
            self._writing = None
