"""Watching: the only place that follows the events of a run, first the stored ones, then the live ones.

A watcher first subscribes to the channel of the run. Then it reads the record, then the stored events, and
then the messages of the channel. Messages that arrive in the meantime are queued, so no event is missed. The
pieces of a streamed reply are not stored: a watcher that joins gets the text so far as one piece, offset 0.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, ExitStack, aclosing, closing, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from openagents_worker.arguments import text_of_caller
from openagents_worker.errors import RedisNoPermission, RedisUnreachable
from openagents_worker.events import RunEvent
from openagents_worker.models import RunRecord
from openagents_worker.redaction import safe_url
from openagents_worker.store.client import AsyncStore, Cell, Plan, Store
from openagents_worker.store.event_cursor import (
    HEAD_FIELDS,
    Entry,
    EventCursor,
    parse_head,
)
from openagents_worker.store.keys import Keys
from openagents_worker.store.permission import add_command_to_permission_error
from openagents_worker.store.plan import CODEC, Emit, EmitNext
from openagents_worker.store.published import PublishedMessage
from openagents_worker.store.pubsub import Inbox, subscribed_inbox
from openagents_worker.store.records import ended_record, run_not_found
from openagents_worker.store.redis_errors import default_if_wrong_type
from openagents_worker.store.watchers import counted_watcher

__all__ = ["await_end", "awatch", "wait_for_end", "watch"]

T = TypeVar("T")

# Parallel reads of all watchers of a store: enough to keep Redis busy, and at most half of the connections.
MAX_PARALLEL_READS = 16
SILENCE_S = 15.0  # pub/sub may lose messages: after so long without a message, the stream is read
RECONNECT_S = 30.0  # a watch survives a restart of Redis; after this time without Redis, it raises
RETRY_PAUSE_S = 0.2
SUBSCRIBE_TIMEOUT_S = 2.0


class _ReconnectLimit:
    """Limits the time in which a watch reconnects to Redis. Before the first answer of Redis, it is 0."""

    def __init__(self) -> None:
        self._until = 0.0

    def restart(self) -> None:
        """Redis has answered: allow `RECONNECT_S` seconds from now."""
        self._until = time.monotonic() + RECONNECT_S

    def has_expired(self, deadline: float | None) -> bool:
        """Whether the watch must raise instead of reconnecting. `deadline`: see `watch`."""
        now = time.monotonic()
        return now >= self._until or (deadline is not None and now >= deadline)


@dataclass(frozen=True, slots=True)
class _Subscribe:
    """A step of `_events_plan`: listen to the channel of the run from now on."""

    channel: str


@dataclass(frozen=True, slots=True)
class _LiveEvents(EmitNext):
    """A step of `_events_plan`. The answers are the events of the next message.

    It is empty if the cursor must read the stream, has seen the last event, or can ignore the message.
    """

    cursor: EventCursor
    silence_s: float
    deadline: float | None

    @property
    def is_complete(self) -> bool:
        return self.cursor.is_over or self.cursor.is_behind

    def remaining_s(self) -> float:
        """How long to wait for the next message. Raises `TimeoutError` after the deadline."""
        return self.silence_s if self.deadline is None else _remaining_s(self.silence_s, self.deadline)

    def events_of(self, message: PublishedMessage | None) -> Sequence[RunEvent]:
        """The events of a message. None: no message for too long, or messages were dropped."""
        if message is None:
            self.cursor.is_behind = True  # read the stream
            return ()
        return self.cursor.live(message)


@dataclass(frozen=True, slots=True)
class _Pause:
    """A step of `_events_plan`: the connection was lost. Wait before the next one."""

    seconds: float


@dataclass(frozen=True, slots=True)
class _ReadHead:
    """A step of `_events_plan`. The answers are the values of `HEAD_FIELDS`."""

    run_id: str


def _events_plan(
    keys: Keys, run_id: str, after: int | None, silence_s: float, deadline: float | None
) -> Plan[None]:
    """A plan that emits the events of a run, as `watch` describes."""
    cursor, reconnect_limit = EventCursor(after, (yield CODEC)), _ReconnectLimit()
    text_of_caller("run_id", run_id)
    head = parse_head(run_id, (yield _ReadHead(run_id)))
    if head is None:
        raise run_not_found(run_id)
    while not cursor.is_over:
        cursor.is_behind = True
        try:
            yield _Subscribe(keys.channel(head.agent_id, head.session_id, run_id))
            while not cursor.is_over:
                if cursor.is_behind:
                    yield from _stored_events(keys, run_id, cursor, reconnect_limit)
                else:
                    yield _LiveEvents(cursor, silence_s, deadline)
        except RedisNoPermission:
            raise  # it would be refused again
        except RedisUnreachable:
            if reconnect_limit.has_expired(deadline):
                raise
            yield _Pause(RETRY_PAUSE_S)


def _stored_events(
    keys: Keys, run_id: str, cursor: EventCursor, reconnect_limit: _ReconnectLimit
) -> Plan[None]:
    """Read the next page of the stream."""
    head = parse_head(run_id, (yield _ReadHead(run_id)))
    if head is None:  # it was deleted or has expired, or Redis has lost its data
        raise run_not_found(run_id)
    cursor.set_head(head)
    answers = yield lambda r: _read_page(r, keys, run_id, cursor)
    reconnect_limit.restart()
    page: Sequence[Entry] = default_if_wrong_type(answers[0], [])
    reply: Mapping[str, str] = default_if_wrong_type(answers[1], {})
    yield Emit(cursor.replay(page, reply))


def _read_page(client: Any, keys: Keys, run_id: str, cursor: EventCursor) -> Any:
    """Read the next page of the stream and the text of the streaming reply, in one transaction."""
    pipeline = client.pipeline(transaction=True)
    pipeline.xrange(keys("events", run_id), f"{cursor.next_seq}-0", "+", cursor.page_size.count)
    pipeline.hgetall(keys("reply", run_id))
    return pipeline.execute(raise_on_error=False)


def _discard(items: Iterable[RunEvent]) -> None:
    """Consume the events that a wait does not show. The cursor follows them as they are consumed."""
    deque(items, maxlen=0)


def _remaining_s(silence_s: float, deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError
    return min(silence_s, remaining_s)


def _counted_plan(
    cell: Cell, run_id: str, after: int | None, silence_s: float, deadline: float | None
) -> Plan[None]:
    """As `_events_plan`. It counts as one watcher from its first step to its end."""
    with counted_watcher(cell.max_watchers):
        yield from _events_plan(cell.keys, run_id, after, silence_s, deadline)


def _end_plan(keys: Keys, run_id: str, deadline: float | None) -> Plan[RunRecord]:
    """A plan that waits for the end of a run, and returns its record."""
    text_of_caller("run_id", run_id)
    while (record := (yield from ended_record(keys, run_id))) is None:
        yield from _events_plan(keys, run_id, None, SILENCE_S, deadline)
    return record


# --- sync callers ----------------------------------------------------------------------------------------


def watch(
    store: Store,
    run_id: str,
    after: int | None = 0,
    *,
    silence_s: float = SILENCE_S,
    deadline: float | None = None,
) -> Generator[RunEvent]:
    """Yield the events of a run until the end of its current life: the stored ones, then the live ones.

    `after` is the number of an event: only later ones are returned (None: no stored events). After
    `silence_s` without a message, the stream is read. `deadline` is a time of `time.monotonic()`; after it,
    `TimeoutError` is raised. Closing the generator closes its connection.

    Raises `RunNotFound`, also if the run vanishes before its last event was seen, `RedisUnreachable` if Redis
    stays unreachable, and `TooManyWatchers` if the process has as many watchers as the cell allows.
    """
    plan = _counted_plan(store.cell, run_id, after, silence_s, deadline)
    with closing(_Subscription(store)) as subscription:
        yield from store.stream(plan, subscription.execute)


def wait_for_end(store: Store, run_id: str, deadline: float | None = None) -> RunRecord:
    """Wait until the run has ended, and return its record. It does not count as a watcher.

    After `deadline`, a time of `time.monotonic()`, `TimeoutError` is raised. Raises `RunNotFound`, and
    `RedisUnreachable` if Redis stays unreachable.
    """
    with closing(_Subscription(store)) as subscription:
        return store.execute(_end_plan(store.keys, run_id, deadline), subscription.execute)


class _Subscription:
    """Executes the steps of `_events_plan` for a thread. It has a connection of its own."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open = ExitStack()
        self._next_message: Callable[[float], PublishedMessage | None] | None = None

    def execute(self, step: Any) -> Any:
        match step:
            case _ReadHead(run_id):
                return self._store.ask(lambda r: r.hmget(self._store.keys("run", run_id), HEAD_FIELDS))
            case _Subscribe(channel):
                self.close()
                cell = self._store.cell
                self._next_message = self._open.enter_context(_listening(cell, channel))
            case _LiveEvents():
                assert self._next_message is not None, "subscribe first"
                return () if step.is_complete else step.events_of(self._next_message(step.remaining_s()))
            case _Pause(seconds):
                self.close()
                time.sleep(seconds)
            case Emit(items):
                _discard(items)
        return None

    def close(self) -> None:
        self._open.close()


@contextmanager
def _listening(cell: Cell, channel: str) -> Iterator[Callable[[float], PublishedMessage | None]]:
    """Subscribe on a separate connection. Yields a function that returns the next message.

    Its argument is the time-out in seconds, after which it returns None.
    """
    own = Store(cell, max_connections=1)
    pubsub = own.redis.pubsub()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped

    def next_message(timeout_s: float) -> PublishedMessage | None:
        found = own.use(lambda _: pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s))
        return None if found is None else PublishedMessage(str(found["data"]))

    try:
        if own.use(lambda _: _subscribed(pubsub, channel)) is None:
            raise _subscription_error(cell)
        yield next_message
    finally:
        pubsub.close()
        own.close()


def _subscribed(pubsub: Any, channel: str) -> Any:
    """Subscribe and return the confirmation; None if Redis does not answer in time."""
    with add_command_to_permission_error("subscribe", channel):
        pubsub.subscribe(channel)
        return pubsub.get_message(timeout=SUBSCRIBE_TIMEOUT_S)


def _subscription_error(cell: Cell) -> RedisUnreachable:
    return RedisUnreachable(f"Redis at {safe_url(cell.url)} does not answer a subscription")


# --- asyncio ---------------------------------------------------------------------------------------------


async def awatch(
    store: AsyncStore, run_id: str, after: int | None = 0, *, silence_s: float = SILENCE_S
) -> AsyncGenerator[RunEvent]:
    """As `watch`, for asyncio. Use `asyncio.timeout` for a deadline.

    All watchers of an event loop share one pub/sub connection. A slow watcher does not delay the others and
    loses nothing: it continues from the stream.
    """
    plan = _counted_plan(store.cell, run_id, after, silence_s, None)
    async with (
        aclosing(_SharedSubscription(store)) as subscription,
        aclosing(store.stream(plan, subscription.execute)) as events,
    ):
        async for event in events:
            yield event


async def await_end(store: AsyncStore, run_id: str) -> RunRecord:
    """As `wait_for_end`, for asyncio. Use `asyncio.timeout` for a deadline."""
    async with aclosing(_SharedSubscription(store)) as subscription:
        return await store.execute(_end_plan(store.keys, run_id, None), subscription.execute)


class _SharedSubscription:
    """Executes the steps of `_events_plan` on an event loop, whose watchers share one connection."""

    def __init__(self, store: AsyncStore) -> None:
        self._store = store
        self._open = AsyncExitStack()
        self._inbox: Inbox | None = None

    def execute(self, step: Any) -> Awaitable[Any]:
        return self._live_events(step) if isinstance(step, _LiveEvents) else self._execute(step)

    async def _live_events(self, step: _LiveEvents) -> Sequence[RunEvent]:
        inbox = self._inbox
        assert inbox is not None, "subscribe first"
        if step.is_complete:
            return ()
        if (arrival := inbox.arrival(step.remaining_s())) is not None:
            await arrival
        return step.events_of(inbox.take())

    async def _execute(self, step: Any) -> Any:
        match step:
            case _ReadHead(run_id):
                key = self._store.keys("run", run_id)
                return await _limited_read(self._store, lambda r: r.hmget(key, HEAD_FIELDS))
            case _Subscribe(channel):
                await self.aclose()
                cell = self._store.cell
                self._inbox = await self._open.enter_async_context(subscribed_inbox(cell, channel))
            case _Pause(seconds):
                await self.aclose()
                await asyncio.sleep(seconds)
            case Emit(items):
                _discard(items)
        return None

    async def aclose(self) -> None:
        await self._open.aclose()


# By redis-py client, of which each event loop has one.
_read_limits: WeakKeyDictionary[Any, asyncio.Semaphore] = WeakKeyDictionary()


async def _limited_read(store: AsyncStore, question: Callable[[Any], Awaitable[T]]) -> T:
    """Read for a watcher. The number of parallel reads is limited: the store needs connections for others."""
    async with _read_limits.setdefault(store.redis, asyncio.Semaphore(MAX_PARALLEL_READS)):
        return await store.ask(question)
