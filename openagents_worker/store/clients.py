"""Clients of redis-py that say, when Redis refuses a command for want of a right, which command it was."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio as redis_async

from openagents_worker.store.permission import naming

__all__ = ["AsyncClient", "Client"]


class Client(redis.Redis):
    """The synchronous client."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        with naming(*args):
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]  # redis-py's


class AsyncClient(redis_async.Redis):
    """The client for asyncio."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with naming(*args):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
