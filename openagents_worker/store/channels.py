"""Channels. The only place where all who watch on an event loop share one pub/sub connection.

One task follows the connection: it subscribes to what somebody listens to, unsubscribes from what nobody
does any more, and puts each message into the inbox of every listener. It lives from the first listener to
the last. Nothing is promised beyond that: a listener that hears of a loss asks the stream.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from openagents_worker.errors import RedisUnreachable
from openagents_worker.redaction import safe_url
from openagents_worker.store.client import AsyncStore, Cell

__all__ = ["Inbox", "listening"]

INBOX_MESSAGES = 256  # what a watcher may be behind; then its messages are dropped, and it reads the stream
SUBSCRIBE_TIMEOUT_S = 2.0
PROBE_S = 15.0  # a connection that was silent for so long is asked whether it is still there
PROBE_ANSWER_S = 5.0
BURST = 64  # messages handed out before the watchers get their turn


class Inbox:
    """What one listener has yet to hear of its channel."""

    def __init__(self) -> None:
        self._messages: deque[str] = deque()
        self._news = asyncio.Event()
        self._missed = False
        self._lost: RedisUnreachable | None = None

    def put(self, text: str) -> None:
        if len(self._messages) == INBOX_MESSAGES:
            self._messages.clear()
            self._missed = True
        self._messages.append(text)
        self._news.set()

    def lose(self, error: RedisUnreachable) -> None:
        """The connection is gone: nothing more will come."""
        self._lost = error
        self._news.set()

    async def next(self, timeout_s: float) -> str | None:
        """The next message. None: there was none for so long, or there were too many and some are missing.

        Raises `RedisUnreachable` when the connection was lost.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        except TimeoutError:
            return None
        if self._lost is not None:
            raise self._lost
        missed, self._missed = self._missed, False
        text = None if missed else self._messages.popleft()
        if not self._messages:
            self._news.clear()
        return text


_connections: dict[tuple[asyncio.AbstractEventLoop, str], _Connection] = {}


@asynccontextmanager
async def listening(cell: Cell, channel: str) -> AsyncIterator[Inbox]:
    """An inbox into which falls whatever is published on the channel from now on.

    Raises `RedisUnreachable` when the subscription is not confirmed.
    """
    place = asyncio.get_running_loop(), cell.url
    if place not in _connections:
        _connections[place] = _Connection(cell, on_end=lambda: _connections.pop(place, None))
    connection, inbox = _connections[place], Inbox()
    connection.add(channel, inbox)
    try:
        await connection.confirmed(channel, inbox)
        yield inbox
    finally:
        await connection.remove(channel, inbox)


class _Connection:
    """The connection of one loop to one Redis."""

    def __init__(self, cell: Cell, on_end: Any) -> None:
        self._cell = cell
        self._on_end = on_end
        self._inboxes: dict[str, set[Inbox]] = {}
        self._subscribed: set[str] = set()
        self._unanswered: Counter[str] = Counter()
        self._wanted_changed = asyncio.Event()
        self._answered = asyncio.Event()
        self._task = asyncio.create_task(self._live(), name=f"events of {safe_url(cell.url)}")
