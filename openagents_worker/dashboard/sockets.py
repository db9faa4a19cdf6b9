"""Brokers at a Unix socket, in Flower. The only place that changes how it counts the messages of queues.

Flower reads neither the database nor the user from the URL of a socket: its page shows the queues of database
0, or an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flower.utils import broker

from openagents_worker.addresses import as_redis
from openagents_worker.store.client import AsyncStore, Cell

__all__ = ["read_sockets_as_celery_does"]


def read_sockets_as_celery_does() -> None:
    """From now on Flower, in this process, counts messages where Celery puts them."""
    broker.RedisSocket = RedisAtSocket


class RedisAtSocket(broker.RedisBase):  # type: ignore[misc]  # Flower has no types
    """In place of Flower's `RedisSocket`."""

    def __init__(self, broker_url: str, *args: Any, **options: Any) -> None:
        super().__init__(broker_url, *args, **options)
        self._cell = Cell(as_redis(broker_url) or broker_url)

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """For each queue its name and the number of its messages."""
        wanted = list(names)
        keys = [
            self.broker_prefix + self._q_for_pri(name, step)
            for name in wanted
            for step in self.priority_steps
        ]
        lengths = iter(await self._lengths(keys))
        return [
            {"name": name, "messages": sum(next(lengths) for _ in self.priority_steps)} for name in wanted
        ]

    async def _lengths(self, keys: list[str]) -> list[int]:
        store = AsyncStore(self._cell, max_connections=1)
        try:
            async with store.redis.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.llen(key)
                lengths: list[int] = await store.ask(lambda _: pipe.execute())
                return lengths
        finally:
            await store.close()
