"""Pub/sub: the only place in which the listeners of an event loop share one pub/sub connection.

One task reads the connection. It subscribes to the channels that have listeners, unsubscribes from the
others, and puts each message, as one object, into the inbox of every listener of its channel. The task exists
as long as there are listeners. Pub/sub and inboxes may lose messages: a listener that learns of a loss must
read the stream.
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
from openagents_worker.store.permission import add_command_to_permission_error
from openagents_worker.store.published import PublishedMessage

__all__ = ["Inbox", "subscribed_inbox"]

INBOX_MESSAGES = 256  # a listener that is further behind must continue from the stream
SUBSCRIBE_TIMEOUT_S = 5.0
PROBE_S = 15.0  # after so long without a message, the connection is probed
PROBE_ANSWER_S = 5.0
MESSAGES_PER_TURN = 64  # after so many messages, other tasks of the loop may run


class Inbox:
    """The messages of a channel that one listener has not read yet. If it is full, messages are dropped."""

    def __init__(self) -> None:
        self.subscribed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._messages: deque[PublishedMessage] = deque()
        self._missed = False
        self._waiter: asyncio.Future[None] | None = None
        self._deadline = 0.0  # loop time until which the listener waits
        self._timer: asyncio.TimerHandle | None = None
        self._error: RedisUnreachable | None = None

    def put(self, message: PublishedMessage) -> None:
        if len(self._messages) == INBOX_MESSAGES:
            self._messages.clear()
            self._missed = True
        self._messages.append(message)
        self._wake()

    def fail(self, error: RedisUnreachable) -> None:
        """The connection is lost: `next` raises this error from now on."""
        self._error = error
        self.subscribed.set()
        self._wake()

    async def next(self, timeout_s: float) -> PublishedMessage | None:
        """The next message. None: no message arrived within `timeout_s`, or messages were dropped.

        Raises `RedisUnreachable` if the connection is lost.
        """
        if (arrival := self.arrival(timeout_s)) is not None:
            await arrival
        return self.take()

    def arrival(self, timeout_s: float) -> asyncio.Future[None] | None:
        """What to await before `take`: it is done after `timeout_s`, too. None: `take` at once.

        The two are `next` without its coroutine, for the watchers: they wait once for each event.
        """
        if self._messages or self._error is not None:
            return None
        loop = self._loop
        self._deadline = loop.time() + timeout_s
        if self._timer is None or self._timer.when() > self._deadline:
            self.close()
            self._timer = loop.call_at(self._deadline, self._on_timer)
        self._waiter = loop.create_future()
        return self._waiter

    def take(self) -> PublishedMessage | None:
        """What `next` returns or raises, without waiting."""
        if self._error is not None:
            self.check()
        if self._missed or not self._messages:
            self._missed = False
            return None
        return self._messages.popleft()

    def _on_timer(self) -> None:
        """The timer ended. All waits share one timer, because most of them end long before their time-out."""
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._on_timer)
        else:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Cancel the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def check(self) -> None:
        if self._error is not None:
            raise copy.copy(
                self._error
            ) from self._error  # a copy, or it collects the tracebacks of all tasks


@asynccontextmanager
async def subscribed_inbox(cell: Cell, channel: str) -> AsyncIterator[Inbox]:
    """Subscribe to the channel. The inbox receives every message that is published from now on.

    Raises `RedisUnreachable` if Redis does not confirm the subscription in time.
    """
    connection, inbox = _shared_connection(cell), Inbox()
    connection.add(channel, inbox)
    try:
        await _wait_for_confirmation(cell, inbox)
        yield inbox
    finally:
        inbox.close()
        await connection.remove(channel, inbox)


async def _wait_for_confirmation(cell: Cell, inbox: Inbox) -> None:
    try:
        async with asyncio.timeout(SUBSCRIBE_TIMEOUT_S):
            await inbox.subscribed.wait()
    except TimeoutError:
        raise _subscription_error(cell) from None
    inbox.check()


_ConnectionKey = tuple[int, asyncio.AbstractEventLoop, str]  # a process, a loop, and the URL of a Redis

_connections: dict[_ConnectionKey, _SharedConnection] = {}


def _shared_connection(cell: Cell) -> _SharedConnection:
    """The connection of this event loop to this Redis. It is created for the first listener."""
    key = os.getpid(), asyncio.get_running_loop(), cell.url
    if key not in _connections:
        for closed in [other for other in list(_connections) if other[1].is_closed()]:
            _connections.pop(closed, None)  # its store closes its connections
        _connections[key] = _SharedConnection(cell, key)
    return _connections[key]


class _SharedConnection:
    """One pub/sub connection, the task that reads it, and the inboxes of its listeners."""

    def __init__(self, cell: Cell, key: _ConnectionKey) -> None:
        self._cell = cell
        self._key = key
        self._inboxes: dict[str, set[Inbox]] = {}
        self._subscribed: set[str] = set()
        self._unconfirmed: Counter[str] = Counter()
        self._channels_changed = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"listen to {safe_url(cell.url)}")

    # --- listeners ---------------------------------------------------------------------------------------

    def add(self, channel: str, inbox: Inbox) -> None:
        self._inboxes.setdefault(channel, set()).add(inbox)
        self._channels_changed.set()
        if self._is_confirmed(channel):
            inbox.subscribed.set()

    async def remove(self, channel: str, inbox: Inbox) -> None:
        """Remove a listener. Without listeners, the connection is closed."""
        others = self._inboxes[channel]
        others.discard(inbox)
        if not others:
            del self._inboxes[channel]
            self._channels_changed.set()
        if not self._inboxes:
            self._unregister()
            await asyncio.wait([self._task])

    def _unregister(self) -> None:
        """New listeners get another connection."""
        if _connections.get(self._key) is self:
            del _connections[self._key]

    def _is_confirmed(self, channel: str) -> bool:
        """Whether the last subscription is confirmed. Confirmations of earlier subscriptions do not count."""
        return channel in self._subscribed and self._unconfirmed[channel] == 0

    # --- the task ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Read the connection until there are no listeners, or until it breaks: then all inboxes fail."""
        # No time limit for answers: a message may arrive at any time, and a silent connection is probed.
        store = AsyncStore(self._cell, max_connections=1, answer_timeout_s=None)
        error = RedisUnreachable(f"the subscription to Redis at {safe_url(self._cell.url)} has ended")
        try:
            async with store.redis.pubsub() as pubsub:
                await self._follow(store, pubsub)
        except* RedisUnreachable as errors:
            error = _first_error(errors)
        finally:
            self._unregister()
            for inbox in [inbox for inboxes in self._inboxes.values() for inbox in inboxes]:
                inbox.fail(error)
            await store.close()

    async def _follow(self, store: AsyncStore, pubsub: Any) -> None:
        await self._update_subscriptions(store, pubsub)
        async with asyncio.TaskGroup() as group:
            receiving = group.create_task(
                self._receive(store, pubsub), name=f"hear {safe_url(self._cell.url)}"
            )
            while self._inboxes:
                await self._channels_changed.wait()
                await self._update_subscriptions(store, pubsub)
            receiving.cancel()

    async def _update_subscriptions(self, store: AsyncStore, pubsub: Any) -> None:
        """Make the subscriptions match the inboxes, with at most two commands."""
        self._channels_changed.clear()
        wanted = set(self._inboxes)
        if not wanted:
            return  # the connection is closed instead
        if unwanted := self._subscribed - wanted:
            self._subscribed -= unwanted
            await store.use(lambda _: pubsub.unsubscribe(*unwanted))
        if new := wanted - self._subscribed:
            await self._subscribe(store, pubsub, *new)

    async def _subscribe(self, store: AsyncStore, pubsub: Any, *channels: str) -> None:
        self._subscribed.update(channels)
        self._unconfirmed.update(channels)
        await store.use(lambda _: pubsub.subscribe(*channels))

    async def _receive(self, store: AsyncStore, pubsub: Any) -> None:
        burst, probing = 0, False
        while True:
            wait_s = PROBE_ANSWER_S if probing else PROBE_S
            message = await store.use(lambda _, s=wait_s: self._message(pubsub, s))  # type: ignore[misc]
            if message is None and probing:
                raise _subscription_error(self._cell)
            probing = message is None
            if message is not None:
                self._dispatch(message)
            elif self._subscribed:  # probe: a repeated subscription changes nothing, but Redis confirms it
                await self._subscribe(store, pubsub, next(iter(self._subscribed)))
            burst += 1
            if burst % MESSAGES_PER_TURN == 0:
                await asyncio.sleep(0)

    async def _message(self, pubsub: Any, wait_s: float) -> Any:
        # A permission error does not name the channel: it must be one of those that are not confirmed yet.
        with add_command_to_permission_error(
            "subscribe", *(channel for channel, count in self._unconfirmed.items() if count)
        ):
            return await pubsub.get_message(timeout=wait_s)

    def _dispatch(self, message: dict[str, Any]) -> None:
        channel = str(message["channel"])
        match message["type"]:
            case "message":
                inboxes = self._inboxes.get(channel, ())
                published = PublishedMessage(str(message["data"]), is_shared=len(inboxes) > 1)
                for inbox in inboxes:
                    inbox.put(published)
            case "subscribe":
                self._unconfirmed[channel] -= 1
                if self._is_confirmed(channel):
                    del self._unconfirmed[channel]
                    for inbox in self._inboxes.get(channel, ()):
                        inbox.subscribed.set()
            case _:
                pass  # the confirmation of an unsubscription


def _first_error(errors: BaseExceptionGroup[RedisUnreachable]) -> RedisUnreachable:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, RedisUnreachable)
    return error


def _subscription_error(cell: Cell) -> RedisUnreachable:
    return RedisUnreachable(f"Redis at {safe_url(cell.url)} does not answer a subscription")
