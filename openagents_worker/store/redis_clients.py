"""Clients of redis-py whose errors name the refused command, and the key that has a wrong type."""

from __future__ import annotations

import threading
from typing import Any

import redis
import redis.asyncio as redis_async

from openagents_worker.store.redis_errors import add_command_to_error

__all__ = ["AsyncRedisClient", "RedisClient", "SingleConnectionClient", "is_connected"]


class RedisClient(redis.Redis):
    """The synchronous client."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        with add_command_to_error(args):
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]  # redis-py's


class SingleConnectionClient(RedisClient):
    """A synchronous client that keeps one connection, for a few commands per second.

    It skips what redis-py does around a command (pool, metrics, retries), which doubles the time of a
    command. It has no pipelines, and it does not convert the answers of Redis.
    """

    def __init__(self, *, connection_pool: Any) -> None:
        super().__init__(connection_pool=connection_pool)
        self._lock = threading.Lock()
        self._connection: Any = None

    def execute_command(self, *args: Any, **_: Any) -> Any:
        with self._lock:
            connection = self._open_connection()
            with add_command_to_error(args):
                connection.send_command(*args)
                return connection.read_response()

    def connect(self) -> None:
        """Open the connection now instead of at the next command."""
        with self._lock:
            self._open_connection()

    def forget(self) -> None:
        """Drop the connection without closing it. The next command opens another one."""
        self._connection = None

    def _open_connection(self) -> Any:
        if self._connection is None:
            pool: Any = self.connection_pool
            self._connection = pool.get_connection()
        elif not is_connected(self._connection):
            self._connection.connect()
        return self._connection


def is_connected(connection: Any) -> bool:
    """Whether redis-py believes that this connection is open."""
    return getattr(connection, "_sock", None) is not None


class AsyncRedisClient(redis_async.Redis):
    """The client for asyncio."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        with add_command_to_error(args):
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
