"""Clients of redis-py whose errors say which command was refused, and which key holds another type."""

from __future__ import annotations

import threading
from typing import Any

import redis
import redis.asyncio as redis_async
from redis import exceptions

from openagents_worker.store.permission import naming
from openagents_worker.store.redis_errors import note_key

__all__ = ["AsyncClient", "Client", "Line", "is_connected"]


class Client(redis.Redis):
    """The synchronous client."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            with naming(*args):
                return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]  # redis-py's
        except exceptions.ResponseError as error:
            note_key(error, args)
            raise


class Line(Client):
    """A synchronous client that keeps one connection: for a few commands a second, for ever.

    It sends, and reads the answer. What redis-py does around that, for its pool, metrics and repetitions,
    takes as long once more. It knows no pipelines, and answers come as Redis gives them.
    """

    def __init__(self, *, connection_pool: Any) -> None:
        super().__init__(connection_pool=connection_pool)
        self._speaking = threading.Lock()
        self._connection: Any = None

    def execute_command(self, *args: Any, **_: Any) -> Any:
        with self._speaking:
            connection = self._connected()
            try:
                with naming(*args):
                    connection.send_command(*args)
                    return connection.read_response()
            except exceptions.ResponseError as error:
                note_key(error, args)
                raise

    def connect(self) -> None:
        """Have a connection from now on; the next command would make it, too."""
        with self._speaking:
            self._connected()

    def forget(self) -> None:
        """Make another connection when the next one is wanted."""
        self._connection = None

    def _connected(self) -> Any:
        if self._connection is None:
            pool: Any = self.connection_pool
            self._connection = pool.get_connection()
        elif not is_connected(self._connection):
            self._connection.connect()
        return self._connection


def is_connected(connection: Any) -> bool:
    """Whether a connection of redis-py's is open, as far as it knows."""
    return getattr(connection, "_sock", None) is not None


class AsyncClient(redis_async.Redis):
    """The client for asyncio."""

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            with naming(*args):
                return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except exceptions.ResponseError as error:
            note_key(error, args)
            raise
