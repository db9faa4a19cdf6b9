"""The master. The only place that asks sentinels which Redis it is now, and that leaves a former one.

Every connection asks before it connects, and believes no sentinel: what it was told of is asked for its role,
since a sentinel may not have heard of a failover yet. Nor does it rely on being cut off: a master that was
replaced while it lives goes on to take writes, which are lost, until a sentinel makes it a replica some ten
seconds later. So the sentinels are asked again every second, by whoever takes a connection from the pool; it
gives up one to a former master then.
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

from openagents_worker.addresses import Sentinels

__all__ = ["SENTINEL_TIMEOUT_S", "AsyncMaster", "AsyncToMaster", "Master", "ToMaster"]

SENTINEL_TIMEOUT_S = 1.0  # three silent ones and a silent master are known within five seconds
ASK_EVERY_S = 1.0  # a question costs a millisecond; for as long, a master that was replaced may be written to
ASK_AGAIN_S = 10.0  # after one without an answer, which may have taken as long as all their silence
DEMOTED = "the master has become a replica"
NO_ANSWER = (exceptions.ConnectionError, exceptions.TimeoutError, OSError)


class _Known:
    """What redis-py's connections want to know of their pool, and where the master was when we last heard."""

    is_master = True
    check_connection = False

    def __init__(self, sentinels: Sentinels) -> None:
        self.service_name = sentinels.master
        self.address: tuple[str, int] | None = None
        self._ask_at_s = 0.0

    def _is_time_to_ask(self) -> bool:
        """Whether this caller is to ask again; others go on with what is known meanwhile."""
        now_s = time.monotonic()
        if now_s < self._ask_at_s:
            return False
        self._ask_at_s = now_s + ASK_AGAIN_S
        return True

    def _heard(self, address: tuple[str, int]) -> tuple[str, int]:
        self.address = address
        self._ask_at_s = time.monotonic() + ASK_EVERY_S
        return address

    def _is_elsewhere(self, connection: Any) -> bool:
        return self.address is not None and self.address != (connection.host, connection.port)


class Master(_Known):
    """Asks the sentinels, the one that answered last first. Keeps no connection to them."""

    def __init__(self, sentinels: Sentinels, *, timeout_s: float = SENTINEL_TIMEOUT_S) -> None:
        super().__init__(sentinels)
        options = {**_limits(timeout_s), **sentinels.sentinel_login, "retry": Retry(NoBackoff(), 0)}
        self._sentinel = sync.Sentinel(sentinels.hosts, sentinel_kwargs=options)

    def get_master_address(self) -> tuple[str, int]:
        try:
            return self._heard(self._sentinel.discover_master(self.service_name))
        finally:
            for client in self._sentinel.sentinels:
                client.connection_pool.disconnect(inuse_connections=False)

    def has_left(self, connection: Any) -> bool:
        """Whether a connection is to a former master. Without a word from the sentinels it is not."""
        if self._is_time_to_ask():
            with contextlib.suppress(*NO_ANSWER):
                self.get_master_address()
        return self._is_elsewhere(connection)


class AsyncMaster(_Known):
    """As `Master`, for asyncio."""

    def __init__(self, sentinels: Sentinels, *, timeout_s: float = SENTINEL_TIMEOUT_S) -> None:
        super().__init__(sentinels)
        options = {**_limits(timeout_s), **sentinels.sentinel_login, "retry": AsyncRetry(NoBackoff(), 0)}
        self._sentinel = asyncio.Sentinel(sentinels.hosts, sentinel_kwargs=options)

    async def get_master_address(self) -> tuple[str, int]:
        try:
            return self._heard(await self._sentinel.discover_master(self.service_name))
        finally:
            for client in self._sentinel.sentinels:
                await client.connection_pool.disconnect(inuse_connections=False)

    async def has_left(self, connection: Any) -> bool:
        if self._is_time_to_ask():
            with contextlib.suppress(*NO_ANSWER):
                await self.get_master_address()
        return self._is_elsewhere(connection)


class ToMaster(sync.SentinelManagedConnection):
    """A connection to whichever Redis is the master when it is made, or taken from its pool."""

    def connect(self) -> None:
        is_connected = getattr(self, "_sock", None) is not None  # redis-py 5 has no other way to say it
        if is_connected and self.connection_pool.has_left(self):
            self.disconnect()
        super().connect()

    def connect_to(self, address: tuple[str, int]) -> None:
        super().connect_to(address)
        try:
            self.send_command("ROLE", check_health=False)
            _check_role(self.read_response())
        except BaseException:
            self.disconnect()
            raise

    def read_response(self, *args: Any, **options: Any) -> Any:
        # Not redis-py's own: that of 5.0 does not know all options that its pub/sub gives.
        try:
            return super(sync.SentinelManagedConnection, self).read_response(*args, **options)
        except exceptions.ReadOnlyError as error:
            self.disconnect()
            raise exceptions.ConnectionError(DEMOTED) from error


class AsyncToMaster(asyncio.SentinelManagedConnection):
    """As `ToMaster`, for asyncio."""

    async def connect(self) -> None:
        if self.is_connected and await self.connection_pool.has_left(self):
            await self.disconnect()
        await super().connect()

    async def connect_to(self, address: tuple[str, int]) -> None:
        await super().connect_to(address)
        try:
            await self.send_command("ROLE", check_health=False)
            _check_role(await self.read_response())
        except BaseException:
            await self.disconnect(nowait=True)
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super(asyncio.SentinelManagedConnection, self).read_response(*args, **options)
        except exceptions.ReadOnlyError as error:
            await self.disconnect(nowait=True)
            raise exceptions.ConnectionError(DEMOTED) from error


def _limits(timeout_s: float) -> dict[str, float]:
    return {"socket_connect_timeout": timeout_s, "socket_timeout": timeout_s}


def _check_role(answer: Any) -> None:
    if answer[0] not in ("master", b"master"):
        raise exceptions.ConnectionError("the sentinels name a master that is none (any more)")
