"""Channels. The only place where all who listen on an event loop share one pub/sub connection.

One task follows the connection: it subscribes to what somebody listens to, unsubscribes from what nobody
does any more, and puts each message into the inbox of every listener. It lives from the first listener to
the last. Pub/sub promises nothing, and neither do inboxes: whoever hears of a loss asks the stream.
"""

from __future__ import annotations

import asyncio
import copy
import os
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from openagents_worker.errors import RedisUnreachable
from openagents_worker.redaction import safe_url
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.permission import naming

__all__ = ["Inbox", "listening"]

INBOX_MESSAGES = 256  # how far behind a listener may be before it has to catch up from the stream
SUBSCRIBE_TIMEOUT_S = 5.0
PROBE_S = 15.0  # after so long without a word the connection itself is asked whether it is still there
PROBE_ANSWER_S = 5.0
BURST = 64  # messages handed out before the listeners get their turn


class Inbox:
    """What one listener has yet to hear of its channel. Bounded, so that a slow one costs nobody anything."""

    def __init__(self) -> None:
        self.subscribed = asyncio.Event()
        self._messages: deque[str] = deque()
        self._missed = False
        self._waiter: asyncio.Future[None] | None = None
        self._silent_at = 0.0  # on the loop's clock: so long the listener waits
        self._timer: asyncio.TimerHandle | None = None
        self._lost: RedisUnreachable | None = None

    def put(self, text: str) -> None:
        if len(self._messages) == INBOX_MESSAGES:
            self._messages.clear()
            self._missed = True
        self._messages.append(text)
        self._wake()

    def lose(self, error: RedisUnreachable) -> None:
        """The connection is gone: nothing more will come."""
        self._lost = error
        self.subscribed.set()
        self._wake()

    async def next(self, timeout_s: float) -> str | None:
        """The next message. None: there was none for so long, or there were too many and some are missing.

        Raises `RedisUnreachable` once the connection is lost.
        """
        if not self._messages and self._lost is None:
            loop = asyncio.get_running_loop()
            self._silent_at = loop.time() + timeout_s
            if self._timer is None or self._timer.when() > self._silent_at:
                self.close()
                self._timer = loop.call_at(self._silent_at, self._look)
            self._waiter = loop.create_future()
            await self._waiter
        self.check()
        missed, self._missed = self._missed, False
        return None if missed or not self._messages else self._messages.popleft()

    def _look(self) -> None:
        """The one timer of all waits: nearly all of them end long before it, so none has one of its own."""
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        loop = asyncio.get_running_loop()
        if loop.time() < self._silent_at:
            self._timer = loop.call_at(self._silent_at, self._look)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Nobody waits here any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def check(self) -> None:
        if self._lost is not None:
            raise copy.copy(self._lost) from self._lost  # raised in many tasks, one would collect all traces


@asynccontextmanager
async def listening(cell: Cell, channel: str) -> AsyncIterator[Inbox]:
    """An inbox into which falls whatever is published on the channel from now on.

    Raises `RedisUnreachable` when nobody confirms the subscription.
    """
    connection, inbox = _connection(cell), Inbox()
    connection.add(channel, inbox)
    try:
        await _confirmed(cell, inbox)
        yield inbox
    finally:
        inbox.close()
        await connection.remove(channel, inbox)


async def _confirmed(cell: Cell, inbox: Inbox) -> None:
    try:
        async with asyncio.timeout(SUBSCRIBE_TIMEOUT_S):
            await inbox.subscribed.wait()
    except TimeoutError:
        raise _deaf(cell) from None
    inbox.check()


_Place = tuple[int, asyncio.AbstractEventLoop, str]  # a process, a loop, and the URL of a Redis

_connections: dict[_Place, _Connection] = {}


def _connection(cell: Cell) -> _Connection:
    """The one of this loop to this Redis, made for its first listener."""
    place = os.getpid(), asyncio.get_running_loop(), cell.url
    if place not in _connections:
        for closed in [other for other in list(_connections) if other[1].is_closed()]:
            _connections.pop(closed, None)  # its store closes what it has left
        _connections[place] = _Connection(cell, place)
    return _connections[place]


class _Connection:
    """The task that follows one connection, and who listens to it."""

    def __init__(self, cell: Cell, place: _Place) -> None:
        self._cell = cell
        self._place = place
        self._inboxes: dict[str, set[Inbox]] = {}
        self._subscribed: set[str] = set()
        self._unanswered: Counter[str] = Counter()
        self._wishes_changed = asyncio.Event()
        self._task = asyncio.create_task(self._live(), name=f"listen to {safe_url(cell.url)}")

    # --- listeners ---------------------------------------------------------------------------------------

    def add(self, channel: str, inbox: Inbox) -> None:
        self._inboxes.setdefault(channel, set()).add(inbox)
        self._wishes_changed.set()
        if self._is_confirmed(channel):
            inbox.subscribed.set()

    async def remove(self, channel: str, inbox: Inbox) -> None:
        """The last one to leave ends the connection."""
        others = self._inboxes[channel]
        others.discard(inbox)
        if not others:
            del self._inboxes[channel]
            self._wishes_changed.set()
        if not self._inboxes:
            self._forget()
            await asyncio.wait([self._task])

    def _forget(self) -> None:
        """Whoever comes now gets another one."""
        if _connections.get(self._place) is self:
            del _connections[self._place]

    def _is_confirmed(self, channel: str) -> bool:
        """A confirmation may be that of an earlier subscription, ended since: only the last one counts."""
        return channel in self._subscribed and self._unanswered[channel] == 0

    # --- the task ----------------------------------------------------------------------------------------

    async def _live(self) -> None:
        """Follow the connection until it breaks, and tell everybody then, or until nobody listens."""
        # No time limit for answers: messages come when they come, and silence is probed below.
        store = AsyncStore(self._cell, max_connections=1, answer_timeout_s=None)
        lost = RedisUnreachable(f"the events of Redis at {safe_url(self._cell.url)} are followed no more")
        try:
            async with store.redis.pubsub() as pubsub:
                await self._follow(store, pubsub)
        except* RedisUnreachable as errors:
            lost = _first(errors)
        finally:
            self._forget()
            for inbox in [inbox for inboxes in self._inboxes.values() for inbox in inboxes]:
                inbox.lose(lost)
            await store.close()

    async def _follow(self, store: AsyncStore, pubsub: Any) -> None:
        await self._grant_wishes(store, pubsub)
        async with asyncio.TaskGroup() as group:
            hearing = group.create_task(self._hear(store, pubsub), name=f"hear {safe_url(self._cell.url)}")
            while self._inboxes:
                await self._wishes_changed.wait()
                await self._grant_wishes(store, pubsub)
            hearing.cancel()

    async def _grant_wishes(self, store: AsyncStore, pubsub: Any) -> None:
        """Make what is subscribed what is wished for, in two commands however many came and went."""
        self._wishes_changed.clear()
        wished = set(self._inboxes)
        if not wished:
            return  # the connection is about to end
        if gone := self._subscribed - wished:
            self._subscribed -= gone
            await store.use(lambda _: pubsub.unsubscribe(*gone))
        if new := wished - self._subscribed:
            await self._subscribe(store, pubsub, *new)

    async def _subscribe(self, store: AsyncStore, pubsub: Any, *channels: str) -> None:
        self._subscribed.update(channels)
        self._unanswered.update(channels)
        await store.use(lambda _: pubsub.subscribe(*channels))

    async def _hear(self, store: AsyncStore, pubsub: Any) -> None:
        burst, probing = 0, False
        while True:
            wait_s = PROBE_ANSWER_S if probing else PROBE_S
            message = await store.use(lambda _, s=wait_s: self._message(pubsub, s))  # type: ignore[misc]
            if message is None and probing:
                raise _deaf(self._cell)
            probing = message is None
            if message is not None:
                self._hand_out(message)
            elif self._subscribed:  # subscribing once more changes nothing, and is answered
                await self._subscribe(store, pubsub, next(iter(self._subscribed)))
            burst += 1
            if burst % BURST == 0:
                await asyncio.sleep(0)

    async def _message(self, pubsub: Any, wait_s: float) -> Any:
        # A refusal does not say of which channel; those that are not confirmed yet have been asked for.
        with naming("subscribe", *(channel for channel, count in self._unanswered.items() if count)):
            return await pubsub.get_message(timeout=wait_s)

    def _hand_out(self, message: dict[str, Any]) -> None:
        channel = str(message["channel"])
        match message["type"]:
            case "message":
                for inbox in self._inboxes.get(channel, ()):
                    inbox.put(str(message["data"]))
            case "subscribe":
                self._unanswered[channel] -= 1
                if self._is_confirmed(channel):
                    del self._unanswered[channel]
                    for inbox in self._inboxes.get(channel, ()):
                        inbox.subscribed.set()
            case _:
                pass  # the end of a subscription that nobody waits for


def _first(errors: BaseExceptionGroup[RedisUnreachable]) -> RedisUnreachable:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, RedisUnreachable)
    return error


def _deaf(cell: Cell) -> RedisUnreachable:
    return RedisUnreachable(f"Redis at {safe_url(cell.url)} does not answer a subscription")
