"""The control channel: the only place that receives notices over pub/sub, before the next heartbeat."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

from openagents_worker.concurrency import end_task
from openagents_worker.errors import RedisUnreachable
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.worker.background import Health, Leave, background_task

__all__ = ["ControlChannel"]

RETRY_S = 1.0  # notices that are missed meanwhile arrive with the next heartbeat
BURST = 64  # notices that are handled before other tasks of the loop get a turn


class ControlChannel:
    """Listens on the channel of the current incarnation. Call all methods on the loop."""

    def __init__(self, cell: Cell, *, on_notice: Callable[[str], None], leave: Leave = os._exit) -> None:
        # No time-out for an answer: listening blocks until a message arrives.
        self._store = AsyncStore(cell, max_connections=2, answer_timeout_s=None)
        self._on_notice = on_notice
        self._leave = leave
        self._task: asyncio.Task[NoReturn] | None = None
        self._is_listening = asyncio.Event()
        self.health = Health()

    def follow(self, incarnation: str) -> None:
        """Listen for this incarnation from now on, and no longer for the previous one."""
        if self._task is not None:
            self._task.cancel()
        self._task = background_task(self._listen(incarnation), name="control-channel", leave=self._leave)

    async def wait_until_listening(self) -> None:
        """Return when the channel of the first incarnation was subscribed."""
        await self._is_listening.wait()

    async def aclose(self) -> None:
        if self._task is not None:
            await end_task(self._task)
        await self._store.close()

    async def _listen(self, incarnation: str) -> NoReturn:
        """Subscribe and handle messages for ever; reconnect after `RETRY_S`."""
        channel = self._store.keys.notices(incarnation)

        async def handle_messages(client: Any) -> None:
            async with client.pubsub(ignore_subscribe_messages=True) as pubsub:
                await pubsub.subscribe(channel)
                self.health.succeeded()
                self._is_listening.set()
                async for number, message in _with_numbers(pubsub.listen()):
                    self._on_notice(message["data"])
                    if (
                        number % BURST == 0
                    ):  # messages that have already arrived are read without yielding to the loop
                        await asyncio.sleep(0)

        while True:
            try:
                await self._store.use(handle_messages)
            except RedisUnreachable as error:
                self.health.failed(error)
            await asyncio.sleep(RETRY_S)


async def _with_numbers(messages: AsyncIterator[Any]) -> AsyncIterator[tuple[int, Any]]:
    """The messages with their numbers, from 1: `enumerate` for an async iterator."""
    number = 0
    async for message in messages:
        number += 1
        yield number, message
