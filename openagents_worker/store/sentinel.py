"""Sentinel: the only place that asks Redis Sentinel for the master, and that leaves a former master.

A connection asks the sentinels before it connects. It then checks the role of the server, because a sentinel
may not know about a failover yet. After a failover, the former master may accept writes for about ten
seconds, until a sentinel makes it a replica. These writes are lost. Therefore the sentinels are asked again
every second, when a connection is taken from the pool, and a connection to a former master is closed.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from redis import exceptions
from redis import sentinel as sync
from redis.asyncio import sentinel as asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from openagents_worker.redis_url import Sentinels

__all__ = [
    "SENTINEL_TIMEOUT_S",
    "AsyncMasterFinder",
    "AsyncSentinelConnection",
    "MasterFinder",
    "SentinelConnection",
]

SENTINEL_TIMEOUT_S = 1.0  # three silent sentinels and a silent master take less than five seconds
ASK_EVERY_S = 1.0  # a question takes a millisecond; a former master may be written to for this long
ASK_AGAIN_S = 10.0  # after a question without an answer, which may have taken the time-out of all sentinels
DEMOTED = "the master has become a replica"
NO_ANSWER = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)


class _KnownMaster:
    """The last known address of the master, with the attributes that redis-py expects of a sentinel pool."""

    is_master = True
    check_connection = False

    def __init__(self, sentinels: Sentinels) -> None:
        self.service_name = sentinels.master
        self.address: tuple[str, int] | None = None
        self._ask_at_s = 0.0

    def _is_time_to_ask(self) -> bool:
        """Whether this caller must ask the sentinels. Meanwhile, other callers use the known address."""
        now_s = time.monotonic()
        if now_s < self._ask_at_s:
            return False
        self._ask_at_s = now_s + ASK_AGAIN_S
        return True

    def _remember(self, address: tuple[str, int]) -> tuple[str, int]:
        self.address = address
        self._ask_at_s = time.monotonic() + ASK_EVERY_S
        return address

    def _differs_from_master(self, connection: Any) -> bool:
        return self.address is not None and self.address != (connection.host, connection.port)


class MasterFinder(_KnownMaster):
    """Asks the sentinels for the master, first the one that answered last. Keeps no connection to them."""

    def __init__(self, sentinels: Sentinels, *, timeout_s: float = SENTINEL_TIMEOUT_S) -> None:
        super().__init__(sentinels)
        options = {**_timeouts(timeout_s), **sentinels.sentinel_login, "retry": Retry(NoBackoff(), 0)}
        self._sentinel = sync.Sentinel(sentinels.hosts, sentinel_kwargs=options)

    def get_master_address(self) -> tuple[str, int]:
        try:
            return self._remember(self._sentinel.discover_master(self.service_name))
        finally:
            for client in self._sentinel.sentinels:
                client.connection_pool.disconnect(inuse_connections=False)

    def leads_to_former_master(self, connection: Any) -> bool:
        """Whether the connection leads to a former master. False if the sentinels do not answer."""
        if self._is_time_to_ask():
            with contextlib.suppress(*NO_ANSWER):
                self.get_master_address()
        return self._differs_from_master(connection)


class AsyncMasterFinder(_KnownMaster):
    """As `MasterFinder`, for asyncio."""

    def __init__(self, sentinels: Sentinels, *, timeout_s: float = SENTINEL_TIMEOUT_S) -> None:
        super().__init__(sentinels)
        options = {**_timeouts(timeout_s), **sentinels.sentinel_login, "retry": AsyncRetry(NoBackoff(), 0)}
        self._sentinel = asyncio.Sentinel(sentinels.hosts, sentinel_kwargs=options)

    async def get_master_address(self) -> tuple[str, int]:
        try:
            return self._remember(await self._sentinel.discover_master(self.service_name))
        finally:
            for client in self._sentinel.sentinels:
                await client.connection_pool.disconnect(inuse_connections=False)

    async def leads_to_former_master(self, connection: Any) -> bool:
        if self._is_time_to_ask():
            with contextlib.suppress(*NO_ANSWER):
                await self.get_master_address()
        return self._differs_from_master(connection)


class SentinelConnection(sync.SentinelManagedConnection):
    """A connection to the Redis that is the master when the connection is opened or taken from its pool."""

    def connect(self) -> None:
        is_connected = getattr(self, "_sock", None) is not None  # redis-py 5 has no public way
        if is_connected and self.connection_pool.leads_to_former_master(self):
            self.disconnect()
        super().connect()

    def connect_to(self, address: tuple[str, int]) -> None:
        super().connect_to(address)
        try:
            self.send_command("ROLE", check_health=False)
            _require_master(self.read_response())
        except BaseException:
            self.disconnect()
            raise

    def read_response(self, *args: Any, **options: Any) -> Any:
        # Not the method of redis-py: in 5.0, it does not accept all options that its pub/sub passes.
        try:
            return super(sync.SentinelManagedConnection, self).read_response(*args, **options)
        except exceptions.ReadOnlyError as error:
            self.disconnect()
            raise exceptions.ConnectionError(DEMOTED) from error


class AsyncSentinelConnection(asyncio.SentinelManagedConnection):
    """As `SentinelConnection`, for asyncio."""

    async def connect(self) -> None:
        if self.is_connected and await self.connection_pool.leads_to_former_master(self):
            await self.disconnect()
        await super().connect()

    async def connect_to(self, address: tuple[str, int]) -> None:
        await super().connect_to(address)
        try:
            await self.send_command("ROLE", check_health=False)
            _require_master(await self.read_response())
        except BaseException:
            await self.disconnect(nowait=True)
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super(asyncio.SentinelManagedConnection, self).read_response(*args, **options)
        except exceptions.ReadOnlyError as error:
            await self.disconnect(nowait=True)
            raise exceptions.ConnectionError(DEMOTED) from error


def _timeouts(timeout_s: float) -> dict[str, float]:
    return {"socket_connect_timeout": timeout_s, "socket_timeout": timeout_s}


def _require_master(role_answer: Any) -> None:
    """Raises `ConnectionError` unless the answer to ROLE is that of a master."""
    if role_answer[0] not in ("master", b"master"):
        raise exceptions.ConnectionError("the server that the sentinels name as the master is not a master")
