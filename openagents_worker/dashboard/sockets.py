"""Brokers at a Unix socket. The only place that changes how Flower counts the messages of queues.

Flower ignores the database and the user in the URL of a Unix socket. It would show the queues of database 0,
or an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flower.utils import broker

from openagents_worker.redis_url import as_redis
from openagents_worker.store.client import AsyncStore, Cell

__all__ = ["read_sockets_as_celery_does"]


def read_sockets_as_celery_does() -> None:
    """Make Flower in this process read the same Redis database as Celery, as the same user."""
    broker.RedisSocket = RedisAtSocket


class RedisAtSocket(broker.RedisBase):  # type: ignore[misc]  # Flower has no types
    """Replaces Flower's `RedisSocket`."""

    def __init__(self, broker_url: str, *args: Any, **options: Any) -> None:
        super().__init__(broker_url, *args, **options)
        self._cell = Cell(as_redis(broker_url) or broker_url)

    async def queues(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """The name and the number of messages of each queue."""
        queue_names = list(names)
        keys = [
            self.broker_prefix + self._q_for_pri(name, step)
            for name in queue_names
            for step in self.priority_steps
        ]
        lengths = iter(await self._lengths(keys))
        return [
            {"name": name, "messages": sum(next(lengths) for _ in self.priority_steps)}
            for name in queue_names
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
