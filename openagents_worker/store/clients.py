"""Clients of redis-py whose errors say which command was refused, and which key holds another type."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio as redis_async
from redis import exceptions

from openagents_worker.store.failures import note_key
from openagents_worker.store.permission import naming

__all__ = ["AsyncClient", "Client"]


class Client(redis.Redis):
    """The synchronous client."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            with naming(*args):
                return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]  # redis-py's
        except exceptions.ResponseError as error:
            note_key(error, args)
            raise


class AsyncClient(redis_async.Redis):
    """The client for asyncio."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            with naming(*args):
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except exceptions.ResponseError as error:
            note_key(error, args)
            raise
