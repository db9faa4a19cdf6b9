"""The connections of a worker to MCP servers: the only place that shares, keeps and evicts them.

A connection is counted by its users: it is closed only when nobody uses it. Its key holds the whole
definition of the server, with the token, and the session unless the connection is for all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from openagents_worker.agents.sections import McpLimits
from openagents_worker.loops import PerLoop
from openagents_worker.tools.mcp.connection import McpConnection, McpEndpoint

__all__ = ["Connections", "ConnectionLease", "McpServers"]

MAX_LISTS = 200  # remembered lists of tools; a tenant with a token of its own has one of its own


@dataclass(eq=False, slots=True)
class ConnectionLease:
    """The use of a connection: from `acquire` to `release`."""

    connection: McpConnection
    entry: _Entry | None = None
    """None: the connection is not shared."""


@dataclass(eq=False, slots=True)
class _Entry:
    key: str
    connection: McpConnection
    opening: asyncio.Task[None]
    users: int = 0
    last_used: float = 0.0
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _KnownTools:
    tools: list[dict[str, Any]]
    asked_at: float


class Connections:
    """The connections of one event loop."""

    def __init__(self, limits: McpLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self._clock = clock
        self._pooled: dict[str, _Entry] = {}
        self._tools: dict[str, _KnownTools] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._single: set[McpConnection] = set()
        self._is_closed = False

    # --- use ---------------------------------------------------------------------------------------------

    async def acquire(self, endpoint: McpEndpoint, key: str | None) -> tuple[ConnectionLease, bool]:
        """An open connection, and whether it is new. `key`: that of a pooled connection; None: one for this
        use only. Raises `ConnectionFailed`."""
        if self._is_closed:
            raise RuntimeError("the worker is stopping")
        if key is None or not self._has_place_for(key):
            connection = McpConnection(endpoint)
            self._single.add(connection)
            try:
                await connection.open()
            except BaseException:
                self._end(connection)
                raise
            return ConnectionLease(connection), True
        while True:
            entry = self._pooled.get(key)
            if entry is not None and entry.opening.done() and not entry.connection.is_open:
                self._drop(entry)
                entry = None
            is_new = entry is None
            if entry is None:
                entry = self._open(endpoint, key)
            if await self._entered(entry) or is_new:
                return ConnectionLease(entry.connection, entry), is_new
            self._replace(entry)
            self._leave(entry)
            if self._is_closed:
                raise RuntimeError("the worker is stopping")

    async def _entered(self, entry: _Entry) -> bool:
        """Begin to use a connection. Returns whether its server answers."""
        entry.users += 1
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
        try:
            await asyncio.shield(entry.opening)
            return await entry.connection.answers()
        except BaseException:
            self._leave(entry)
            raise

    def _replace(self, entry: _Entry) -> None:
        """Give a connection to nobody else. It is closed when its last user leaves it (M02)."""
        if self._pooled.get(entry.key) is entry:
            del self._pooled[entry.key]
            self._single.add(entry.connection)

    def release(self, lease: ConnectionLease) -> None:
        """End a use. A connection that is not shared is closed, in the background: a server that does not
        end by itself must not delay the run."""
        if lease.entry is None:
            self._end(lease.connection)
        else:
            self._leave(lease.entry)

    def _open(self, endpoint: McpEndpoint, key: str) -> _Entry:
        connection = McpConnection(endpoint)
        opening = asyncio.create_task(
            connection.open(), name=f"open mcp {connection.shown}", context=Context()
        )
        opening.add_done_callback(lambda task: task.cancelled() or task.exception())  # it may have no waiter
        entry = self._pooled[key] = _Entry(key, connection, opening)
        return entry

    def _has_place_for(self, key: str) -> bool:
        """Whether a pooled connection may be kept. Closes the one that was not used for longest, if that
        makes room. One that is in use is never closed (M02)."""
        if key in self._pooled or len(self._pooled) < self.limits.max_pooled_sessions:
            return True
        idle = [entry for entry in self._pooled.values() if entry.users == 0]
        if not idle:
            return False
        self._drop(min(idle, key=lambda entry: entry.last_used))
        return True

    def _leave(self, entry: _Entry) -> None:
        entry.users -= 1
        entry.last_used = self._clock()
        if entry.users:
            return
        if self._pooled.get(entry.key) is not entry:
            self._end(entry.connection)
            return
        if not entry.connection.is_open:
            self._drop(entry)
            return
        entry.timer = asyncio.get_running_loop().call_later(
            self.limits.max_idle_seconds, self._close_if_idle, entry, context=Context()
        )

    def _close_if_idle(self, entry: _Entry) -> None:
        if entry.users == 0 and self._pooled.get(entry.key) is entry:
            self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        """Forget a connection, and close it in the background."""
        if self._pooled.get(entry.key) is entry:
            del self._pooled[entry.key]
        if entry.timer is not None:
            entry.timer.cancel()
        self._close_later(_close(entry))

    def _end(self, connection: McpConnection) -> None:
        """Close a connection that is not shared, in the background."""
        if connection in self._single:
            self._single.discard(connection)
            self._close_later(connection.close())

    def _close_later(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(closing, name="close mcp", context=Context())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # --- lists of tools ----------------------------------------------------------------------------------

    def known_tools(self, key: str) -> list[dict[str, Any]] | None:
        """The tools of a server, if they were asked for not long ago."""
        known = self._tools.get(key)
        if known is None or self._clock() - known.asked_at >= self.limits.preflight_cache_success_ttl:
            return None
        return known.tools

    def remember_tools(self, key: str, tools: list[dict[str, Any]]) -> None:
        self._tools.pop(key, None)
        self._tools[key] = _KnownTools(tools, self._clock())
        while len(self._tools) > MAX_LISTS:
            del self._tools[next(iter(self._tools))]

    def forget_tools(self, key: str) -> None:
        """The connection was lost, or the server says that its list has changed (M03)."""
        self._tools.pop(key, None)

    # --- the resource of an event loop -------------------------------------------------------------------

    async def close(self) -> None:
        """Close all connections."""
        self._is_closed = True
        for entry in list(self._pooled.values()):
            self._drop(entry)
        for connection in list(self._single):
            self._end(connection)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def transports(self) -> Iterator[Any]:
        return iter(())

    def forget(self) -> None:
        """The loop has ended, and with it the supervisors of its servers."""


async def _close(entry: _Entry) -> None:
    if not entry.opening.done():
        entry.opening.cancel()
        await asyncio.wait({entry.opening})
    await entry.connection.close()


@dataclass(eq=False)
class McpServers:
    """The connections of a process, by event loop."""

    limits: McpLimits = field(default_factory=McpLimits)

    def __post_init__(self) -> None:
        self._loops: PerLoop[Connections] = PerLoop(lambda: Connections(self.limits))

    def here(self) -> Connections:
        return self._loops.here()

    async def close(self) -> None:
        await self._loops.close()
