"""The connection: what it never does silently."""

from __future__ import annotations

import asyncio

from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Cell


async def test_a_cancellation_while_sending_is_never_lost(redis_url: str) -> None:
    """A task that is cancelled while its command is on the way ends as cancelled, whenever that is."""
    store = AsyncStore(Cell(redis_url))

    async def ask_for_ever() -> None:
        while True:
            await store.run(scripts.wake(limit=1))

    lost = 0
    for delay in range(300):
        task = asyncio.create_task(ask_for_ever())
        for _ in range(delay % 17):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=0.5)
        if not task.done():
            lost += 1
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
    await store.close()

    assert lost == 0
