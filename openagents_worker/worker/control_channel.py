"""Notices. The only place that hears at once what the heartbeat would be told at its next beat: cancel."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

from openagents_worker.concurrency import end_task
from openagents_worker.errors import RedisUnreachable
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.worker.background import Leave, background_task

__all__ = ["ControlChannel"]

RETRY_S = 1.0  # what is missed meanwhile comes with a beat
BURST = 64  # cancellations that are heard before anything else on the loop gets its turn


class ControlChannel:
    """Listens on the channel of the incarnation that lives now. All its methods are called on the loop."""

    def __init__(self, cell: Cell, *, on_cancel: Callable[[str], None], leave: Leave = os._exit) -> None:
        self._store = AsyncStore(
            cell, max_connections=2, answer_timeout_s=None
        )  # listening may take for ever
        self._on_cancel = on_cancel
        self._leave = leave
        self._task: asyncio.Task[NoReturn] | None = None

    def follow(self, incarnation: str) -> None:
        """Listen to this incarnation from now on, and no longer to the one before."""
        if self._task is not None:
            self._task.cancel()
        self._task = background_task(self._listen(incarnation), name="notices", leave=self._leave)

    async def aclose(self) -> None:
        if self._task is not None:
            await end_task(self._task)
        await self._store.close()

    async def _listen(self, incarnation: str) -> NoReturn:
        channel = self._store.keys.notices(incarnation)

        async def hear(client: Any) -> None:
            async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.subscribe(channel)
                async for number, message in _counted(pubsub.listen()):
                    self._on_cancel(message["data"])
                    if number % BURST == 0:  # what has come already is read without waiting
                        await asyncio.sleep(0)

        while True:
            with contextlib.suppress(RedisUnreachable):
                await self._store.use(hear)
            await asyncio.sleep(RETRY_S)


async def _counted(messages: AsyncIterator[Any]) -> AsyncIterator[tuple[int, Any]]:
    number = 0
    async for message in messages:
        number += 1
        yield number, message
