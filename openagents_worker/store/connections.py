"""Connections: the only place that makes connection pools of redis-py.

Pools have a fixed size. redis-py does not retry commands.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import weakref
from typing import Any

from redis import exceptions

from openagents_worker.store.batching import has_hung_up
from openagents_worker.store.cell import Cell
from openagents_worker.store.redis_errors import translate_connect_errors
from openagents_worker.store.redis_options import connection_options, lossy_text_options

__all__ = ["ANSWER_TIMEOUT_S", "CONNECT_TIMEOUT_S", "make_pool"]

CONNECT_TIMEOUT_S = 1.5  # with two addresses of a host, a failure is reported in less than five seconds
ANSWER_TIMEOUT_S = 2.0

# Otherwise, redis-py 7 and later reads its version from the package metadata for every connection, and sends
# it to the server with two additional commands.
_NO_DRIVER_INFO = {"driver_info": None} if importlib.util.find_spec("redis.driver_info") else {}


def _tracked_class(connection_class: Any) -> Any:
    """A subclass of a redis-py connection class with three changes.

    A failed connect raises `NotSent`. A cancellation is never lost (see below). The class attribute `opened`
    has all open connections; each pool has its own subclass.
    """

    opened_connections: weakref.WeakSet[Any] = weakref.WeakSet()

    class AsyncTrackedConnection(connection_class):  # type: ignore[misc]  # a base known only at run time
        opened = opened_connections
        socket_timeout: float | None

        async def connect(self, *args: Any, **kwargs: Any) -> None:
            with translate_connect_errors():
                if self.is_connected and has_hung_up(self):
                    await self.disconnect(nowait=True)
                await super().connect(*args, **kwargs)
            self.opened.add(self)

        async def disconnect(self, *args: Any, **kwargs: Any) -> None:
            # redis-py waits until the server ends TLS. If that takes too long, or if the wait is cancelled,
            # redis-py leaves the socket open.
            writer = self._writer
            try:
                await super().disconnect(*args, **kwargs)
            except exceptions.TimeoutError:
                pass  # the transport is closed below in any case
            finally:
                if writer is not None:
                    writer.transport.abort()

        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            # redis-py sends with asyncio.wait_for. Before Python 3.12, wait_for can swallow a cancellation
            # that arrives while it returns, and it starts a task for every command.
            timeout_s, self.socket_timeout = self.socket_timeout, None
            if timeout_s is None:
                await super().send_packed_command(command, check_health)
                return
            try:
                async with asyncio.timeout(timeout_s):
                    await super().send_packed_command(command, check_health)
            except TimeoutError as error:
                raise exceptions.TimeoutError("Timeout writing to socket") from error
            finally:
                self.socket_timeout = timeout_s

    class TrackedConnection(connection_class):  # type: ignore[misc]
        opened = opened_connections

        def connect(self, *args: Any, **kwargs: Any) -> None:
            with translate_connect_errors():
                super().connect(*args, **kwargs)
            self.opened.add(self)

    return (
        AsyncTrackedConnection if inspect.iscoroutinefunction(connection_class.connect) else TrackedConnection
    )


def make_pool(
    pool_class: Any,
    cell: Cell,
    retry: Any,
    *,
    max_connections: int,
    answer_timeout_s: float | None,
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
    pool_timeout_s: float = ANSWER_TIMEOUT_S,
) -> Any:
    """A connection pool of redis-py for this cell. An invalid URL raises here."""
    options = {
        **lossy_text_options(),
        "socket_connect_timeout": connect_timeout_s,
        "socket_timeout": answer_timeout_s,
        "retry": retry,
        "max_connections": max_connections,
        "timeout": pool_timeout_s,
        "health_check_interval": 0,
        "client_name": "openagents",
        **_NO_DRIVER_INFO,
    }
    options |= connection_options(pool_class, cell.url, connect_timeout_s, answer_timeout_s)
    pool = pool_class(**options)
    pool.connection_class = _tracked_class(pool.connection_class)
    return pool
