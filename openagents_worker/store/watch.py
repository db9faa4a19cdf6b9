"""Watching: the only place that follows the events of a run, first the stored ones, then the live ones.

A watcher first subscribes to the channel of the run. Then it reads the record, then the stored events, and
then the messages of the channel. Messages that arrive in the meantime are queued, so no event is missed. The
pieces of a streamed reply are not stored: a watcher that joins gets the text so far as one piece with offset
0.
"""

from __future__ import annotations

import asyncio
import time
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from openagents_worker.arguments import number_of, text_of_caller
from openagents_worker.errors import RecordUnreadable, RedisNoPermission, RedisUnreachable
from openagents_worker.events import RunEvent
from openagents_worker.jsontext import LARGEST_COUNT, loads
from openagents_worker.models import RunState
from openagents_worker.redaction import safe_url
from openagents_worker.store.client import AsyncStore, Cell, Plan, Store
from openagents_worker.store.formats import WRITTEN, stored_format, translate_parse_errors
from openagents_worker.store.keys import Keys
from openagents_worker.store.paging import PageSize
from openagents_worker.store.permission import add_command_to_refusal
from openagents_worker.store.pubsub import Inbox, subscribed_inbox
from openagents_worker.store.records import run_not_found
from openagents_worker.store.redis_errors import default_if_wrong_type
from openagents_worker.store.watchers import counted_watcher

__all__ = ["Entry", "EventCursor", "RunHead", "awatch", "history", "stored_event", "watch"]

T = TypeVar("T")

FIRST_PAGE = 100
PAGE = 500
# Parallel reads of all watchers of a store: enough to keep Redis busy, and at most half of the connections.
MAX_PARALLEL_READS = 16
SILENCE_S = 15.0  # pub/sub may lose messages: after so long without a message, the stream is read
RECONNECT_S = 30.0  # a watch survives a restart of Redis; after this time without Redis, it raises
RETRY_PAUSE_S = 0.2
SUBSCRIBE_TIMEOUT_S = 2.0

Entry = tuple[str, Mapping[str, str]]  # a stream entry: id ({seq}-0) and fields, see `stored_event`
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class RunHead:
    """The fields of a run record that a watcher needs. `seq` is the number of the newest event."""

    run_id: str
    state: RunState
    seq: int
    life: int
    agent_id: str
    session_id: str


_HEAD_FIELDS = ("state", "seq", "life", "agent", "session", "format")


def _parse_head(run_id: str, values: Sequence[str | None]) -> RunHead | None:
    state, seq, life, agent_id, session_id, format_ = values
    if state is None:
        return None
    with translate_parse_errors(stored_format(format_), run_id=run_id):
        return RunHead(
            run_id, RunState(state), _last_number(seq), int(life or 1), agent_id or "", session_id or ""
        )


def _last_number(seq: str | None) -> int:
    """Parse the number of the newest event. Raises `ValueError` if it cannot be the id of a stream entry."""
    count = int(seq or 0)
    if not 0 <= count <= LARGEST_COUNT:
        raise ValueError("seq is not the number of an event")
    return count


def stored_event(head: RunHead, entry: Entry) -> RunEvent:
    """Parse a stored event. The fields that all events of the run share come from `head`.

    Raises `RecordUnreadable`.
    """
    with translate_parse_errors(WRITTEN, run_id=head.run_id):
        return _stored_event(head, *entry)


def _stored_event(head: RunHead, id_: str, fields: Mapping[str, str]) -> RunEvent:
    return RunEvent(
        name=fields["name"],
        seq=int(id_.partition("-")[0]),
        run_id=head.run_id,
        session_id=head.session_id,
        agent_id=head.agent_id,
        life=int(fields["life"]),
        attempt=int(fields["attempt"]),
        worker=fields["worker"] or None,
        timestamp=EPOCH + timedelta(milliseconds=int(fields["at"])),
        payload=loads(fields["payload"]),
        final=fields["final"] == "1",
    )


def _event_or_none(head: RunHead, entry: Entry) -> RunEvent | None:
    """The event, or None if the library did not write this entry. It must not hide the other events."""
    try:
        return stored_event(head, entry)
    except RecordUnreadable:
        return None


def history(keys: Keys, run_id: str) -> Plan[list[RunEvent]]:
    """A plan that returns the stored events of a run, oldest first, without waiting. Raises `RunNotFound`."""
    head = _parse_head(run_id, (yield lambda r: r.hmget(keys("run", run_id), _HEAD_FIELDS)))
    if head is None:
        raise run_not_found(run_id)
    events: list[RunEvent] = []
    start, size = "-", _page_size()
    while page := (
        yield lambda r, start=start, count=size.count: r.xrange(keys("events", run_id), start, "+", count)
    ):
        size.learn(len(page), _bytes_of(page))
        events += [event for event in (_event_or_none(head, entry) for entry in page) if event is not None]
        start = f"({page[-1][0]}"
    return events


def _page_size() -> PageSize:
    return PageSize(first=FIRST_PAGE, max_count=PAGE)


def _bytes_of(page: Sequence[Entry]) -> int:
    return sum(len(fields.get("payload", "")) for _, fields in page)


class EventCursor:
    """The position of one watcher in the events of a run, without I/O.

    `after` is the number of the last event that the watcher has seen; None: it wants only events from now on.
    The caller passes the head of the run (`set_head`), pages of the stream while `is_behind` is True
    (`replay`), and else the live messages (`live`), until `is_over` is True: after the final event of the
    life in which the watcher joined, or when this event can no longer arrive.
    """

    def __init__(self, after: int | None = 0) -> None:
        self.is_behind = True
        self.is_over = False
        self.page_size = _page_size()
        self._wants_stored = after is not None
        self._wanted = None if after is None else number_of("after", after) + 1
        self._read_head: RunHead | None = None
        self._life: int | None = None
        self._ends_with_replay = False
        self._first_skipped: int | None = None  # number of the first unreadable event before `wanted`
        self._replayed_until: datetime | None = None  # time of the last replayed event or reply text

    @property
    def wanted(self) -> int:
        """The number of the next event to return."""
        return self._wanted or 1

    def set_head(self, head: RunHead | None) -> None:
        """Set the head of the run, up to which the stream must be read. None: the record is deleted."""
        if head is None:
            self.is_over = True
            return
        self._read_head = head
        self._life = head.life if self._life is None else self._life
        self._wanted = head.seq + 1 if self._wanted is None else self._wanted
        self._ends_with_replay = head.state.is_terminal or head.life > self._life
        self.is_behind = True

    def replay(self, page: Sequence[Entry], reply: Mapping[str, str] | None = None) -> Iterator[RunEvent]:
        """The events of a page of the stream, read from `wanted` on, and of the streaming reply."""
        head = self._read_head
        assert head is not None, "call set_head first"
        for id_, fields in page:
            if self.is_over or int(id_.partition("-")[0]) < self.wanted:
                continue
            event = _event_or_none(head, (id_, fields))
            if event is None:
                self._skip_unreadable(int(id_.partition("-")[0]))
                continue
            yield from self._gap_before(event)
            self._replayed_until = event.timestamp
            yield self._mark_seen(event)
        requested = self.page_size.count
        self.page_size.learn(len(page), _bytes_of(page))
        if len(page) < requested:
            self.is_behind = False
            self.is_over = self.is_over or self._ends_with_replay
            if reply and self._wants_stored and not self.is_over:
                yield self._reply_so_far(reply)

    def live(self, text: str) -> Sequence[RunEvent]:
        """Events of a published message. If it skips a number, a message was lost: sets `is_behind`."""
        try:
            event = RunEvent.from_json(text)
        except (ValueError, RecursionError):
            return ()  # a message that another program published on our channel
        if event.seq is None:
            return (event,) if self._replayed_until is None or event.timestamp >= self._replayed_until else ()
        if event.seq == self.wanted:
            return (*self._gap_before(event), self._mark_seen(event))
        if event.seq > self.wanted:
            self.is_behind = True
        return ()

    def _mark_seen(self, event: RunEvent) -> RunEvent:
        """Move the cursor behind this event, and return it."""
        assert event.seq is not None
        self._wanted = event.seq + 1
        self.is_over = event.final and event.life >= (self._life or 1)
        return event

    def _reply_so_far(self, reply: Mapping[str, str]) -> RunEvent:
        """The text that was streamed before this watcher joined, as one `llm.delta` event with offset 0."""
        head, attempt = self._read_head, int(reply["attempt"])
        assert head is not None, "call set_head first"
        event = RunEvent(
            name="llm.delta",
            seq=None,
            run_id=head.run_id,
            session_id=head.session_id,
            agent_id=head.agent_id,
            life=head.life,
            attempt=attempt,
            timestamp=datetime.fromisoformat(reply["at"]),
            payload={"call": reply["call"], "attempt": attempt, "offset": 0, "text": reply["text"]},
        )
        self._replayed_until = event.timestamp
        return event

    def _skip_unreadable(self, seq: int) -> None:
        """Skip an unreadable event. The next readable event is preceded by `events.gap`."""
        self._first_skipped = self._first_skipped or self.wanted
        self._wanted = seq + 1

    def _gap_before(self, event: RunEvent) -> Iterator[RunEvent]:
        """An `events.gap` event if events before this one were deleted or cannot be read."""
        assert event.seq is not None
        begin, self._first_skipped = self._first_skipped or self.wanted, None
        if event.seq > begin:
            gap = {"name": "events.gap", "seq": None, "worker": None, "final": False}
            yield event.model_copy(update={**gap, "payload": {"from": begin, "to": event.seq - 1}})


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


def _count_watcher(cell: Cell, is_wait: bool) -> AbstractContextManager[None]:
    """Count one watcher. A wait for the end of a run is not counted: its blocked caller is the limit."""
    return nullcontext() if is_wait else counted_watcher(cell.max_watchers)


def watch(
    store: Store,
    run_id: str,
    after: int | None = 0,
    *,
    silence_s: float = SILENCE_S,
    deadline: float | None = None,
    is_wait: bool = False,
) -> Generator[RunEvent]:
    """Yield the events of a run until the end of its current life: the stored ones, then the live ones.

    `after` is the number of an event: only later ones are returned (None: no stored events). After
    `silence_s` without a message, the stream is read. `deadline` is a time of `time.monotonic()`; after it,
    `TimeoutError` is raised. `is_wait`: the caller waits for the end of the run and does not count as a
    watcher. Closing the generator closes its connection.

    Raises `RunNotFound`, `RedisUnreachable` if Redis stays unreachable, and `TooManyWatchers` if the process
    has as many watchers as the cell allows.
    """
    with _count_watcher(store.cell, is_wait):
        cursor, reconnect_limit = EventCursor(after), _ReconnectLimit()
        text_of_caller("run_id", run_id)
        channel = _channel(store, run_id, _read_head(store, run_id))
        while not cursor.is_over:
            cursor.is_behind = True
            try:
                with _listening(store.cell, channel) as next_message:
                    while not cursor.is_over:
                        yield from _next_events(
                            store, run_id, cursor, reconnect_limit, next_message, silence_s, deadline
                        )
            except RedisNoPermission:
                raise  # it would be refused again
            except RedisUnreachable:
                if reconnect_limit.has_expired(deadline):
                    raise
                time.sleep(RETRY_PAUSE_S)


def _next_events(
    store: Store,
    run_id: str,
    cursor: EventCursor,
    reconnect_limit: _ReconnectLimit,
    next_message: Callable[[float], str | None],
    silence_s: float,
    deadline: float | None,
) -> Iterable[RunEvent]:
    """The next events: from the stream if the cursor is behind, else from the next message."""
    if cursor.is_behind:
        cursor.set_head(_read_head(store, run_id))
        if cursor.is_over:
            return ()
        page, reply = _entries_and_reply(store.ask(lambda r: _read_page(r, store.keys, run_id, cursor)))
        reconnect_limit.restart()
        return cursor.replay(page, reply)
    text = next_message(_remaining_s(time.monotonic() + silence_s, deadline))
    if text is not None:
        return cursor.live(text)
    cursor.is_behind = True  # no message for too long: read the stream
    return ()


@contextmanager
def _listening(cell: Cell, channel: str) -> Iterator[Callable[[float], str | None]]:
    """Subscribe on a separate connection. Yields a function that returns the next message.

    Its argument is the time-out in seconds, after which it returns None.
    """
    own = Store(cell, max_connections=1)
    pubsub = own.redis.pubsub()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped

    def next_message(timeout_s: float) -> str | None:
        found = own.use(lambda _: pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s))
        return None if found is None else str(found["data"])

    try:
        if own.use(lambda _: _subscribed(pubsub, channel)) is None:
            raise _subscription_error(cell)
        yield next_message
    finally:
        pubsub.close()
        own.close()


def _subscribed(pubsub: Any, channel: str) -> Any:
    """Subscribe and return the confirmation; None if Redis does not answer in time."""
    with add_command_to_refusal("subscribe", channel):
        pubsub.subscribe(channel)
        return pubsub.get_message(timeout=SUBSCRIBE_TIMEOUT_S)


async def awatch(
    store: AsyncStore,
    run_id: str,
    after: int | None = 0,
    *,
    silence_s: float = SILENCE_S,
    is_wait: bool = False,
) -> AsyncGenerator[RunEvent]:
    """As `watch`, for asyncio. Use `asyncio.timeout` for a deadline.

    All watchers of an event loop share one pub/sub connection. A slow watcher does not delay the others and
    loses nothing: it continues from the stream.
    """
    with _count_watcher(store.cell, is_wait):
        cursor, reconnect_limit = EventCursor(after), _ReconnectLimit()
        text_of_caller("run_id", run_id)
        channel = _channel(store, run_id, await _aread_head(store, run_id))
        while not cursor.is_over:
            cursor.is_behind = True
            try:
                async with subscribed_inbox(store.cell, channel) as inbox:
                    while not cursor.is_over:
                        for event in await _anext_events(
                            store, run_id, cursor, reconnect_limit, inbox, silence_s
                        ):
                            yield event
            except RedisNoPermission:
                raise  # it would be refused again
            except RedisUnreachable:
                if reconnect_limit.has_expired(None):
                    raise
                await asyncio.sleep(RETRY_PAUSE_S)


async def _anext_events(
    store: AsyncStore,
    run_id: str,
    cursor: EventCursor,
    reconnect_limit: _ReconnectLimit,
    inbox: Inbox,
    silence_s: float,
) -> Iterable[RunEvent]:
    """As `_next_events`, for asyncio."""
    if cursor.is_behind:
        cursor.set_head(await _aread_head(store, run_id))
        if cursor.is_over:
            return ()
        page, reply = _entries_and_reply(await store.ask(lambda r: _read_page(r, store.keys, run_id, cursor)))
        reconnect_limit.restart()
        return cursor.replay(page, reply)
    text = await inbox.next(silence_s)
    if text is not None:
        return cursor.live(text)
    cursor.is_behind = True  # no message for too long, or messages were dropped: read the stream
    return ()


async def _aread_head(store: AsyncStore, run_id: str) -> RunHead | None:
    return _parse_head(
        run_id, await _limited_read(store, lambda r: r.hmget(store.keys("run", run_id), _HEAD_FIELDS))
    )


# By redis-py client, of which each event loop has one.
_read_limits: WeakKeyDictionary[Any, asyncio.Semaphore] = WeakKeyDictionary()


async def _limited_read(store: AsyncStore, question: Callable[[Any], Awaitable[T]]) -> T:
    """Read for a watcher. The number of parallel reads is limited: the store needs connections for others."""
    async with _read_limits.setdefault(store.redis, asyncio.Semaphore(MAX_PARALLEL_READS)):
        return await store.ask(question)


def _read_head(store: Store, run_id: str) -> RunHead | None:
    return _parse_head(run_id, store.ask(lambda r: r.hmget(store.keys("run", run_id), _HEAD_FIELDS)))


def _read_page(client: Any, keys: Keys, run_id: str, cursor: EventCursor) -> Any:
    """Read the next page of the stream and the text of the streaming reply, in one transaction."""
    pipeline = client.pipeline(transaction=True)
    pipeline.xrange(keys("events", run_id), f"{cursor.wanted}-0", "+", cursor.page_size.count)
    pipeline.hgetall(keys("reply", run_id))
    return pipeline.execute(raise_on_error=False)


def _entries_and_reply(answers: Sequence[Any]) -> tuple[Sequence[Entry], Mapping[str, str]]:
    """Parse the answers of `_read_page`. A key of a wrong type counts as empty."""
    return default_if_wrong_type(answers[0], []), default_if_wrong_type(answers[1], {})


def _channel(store: Store | AsyncStore, run_id: str, head: RunHead | None) -> str:
    if head is None:
        raise run_not_found(run_id)
    return store.keys.channel(head.agent_id, head.session_id, run_id)


def _remaining_s(silent_until: float, deadline: float | None) -> float:
    now = time.monotonic()
    if deadline is not None and now >= deadline:
        raise TimeoutError
    return max(0.0, min(silent_until, deadline or silent_until) - now)


def _subscription_error(cell: Cell) -> RedisUnreachable:
    return RedisUnreachable(f"Redis at {safe_url(cell.url)} does not answer a subscription")
