"""Watching. The only place that follows a run's events: every stored one once and in order, then live.

A watcher subscribes first, then looks where the run stands, then reads the stream, then listens. What is
published in between waits for it, so nothing falls between replay and live. The pieces of a reply that is
streaming are in no stream; who joins gets what was said so far as one piece with offset 0.
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
from openagents_worker.store.formats import WRITTEN, reading, stored_format
from openagents_worker.store.keys import Keys
from openagents_worker.store.paging import PageSize
from openagents_worker.store.permission import naming
from openagents_worker.store.pubsub import Inbox, listening
from openagents_worker.store.records import run_not_found
from openagents_worker.store.redis_errors import or_else
from openagents_worker.store.watchers import one_more

__all__ = ["Entry", "EventCursor", "RunHead", "awatch", "history", "stored_event", "watch"]

T = TypeVar("T")

FIRST_PAGE = 100
PAGE = 500
READERS = (
    16  # reads at once of one store's watchers: enough to keep Redis busy, and a quarter of its connections
)
SILENCE_S = 15.0  # pub/sub promises nothing: after so long without a word the stream itself is asked
RECONNECT_S = 30.0  # a watch outlives a restart of Redis; longer than that somebody should hear of it
PAUSE_S = 0.2
SUBSCRIBE_TIMEOUT_S = 2.0

Entry = tuple[str, Mapping[str, str]]  # of a stream: its id is {seq}-0; see `stored_event` for its fields
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class RunHead:
    """Where a run stands: its state, the number of its newest event, its life, and whose it is."""

    run_id: str
    state: RunState
    seq: int
    life: int
    agent_id: str
    session_id: str


_HEAD_FIELDS = ("state", "seq", "life", "agent", "session", "format")


def _head_of(run_id: str, values: Sequence[str | None]) -> RunHead | None:
    state, seq, life, agent_id, session_id, format_ = values
    if state is None:
        return None
    with reading(stored_format(format_), run_id=run_id):
        return RunHead(
            run_id, RunState(state), _last_number(seq), int(life or 1), agent_id or "", session_id or ""
        )


def _last_number(seq: str | None) -> int:
    """The number of the last event. Raises ValueError for one that no stream can have as an id."""
    count = int(seq or 0)
    if not 0 <= count <= LARGEST_COUNT:
        raise ValueError("seq is not the number of an event")
    return count


def stored_event(head: RunHead, entry: Entry) -> RunEvent:
    """An event as the scripts store it: without what all events of the run share.

    Raises `RecordUnreadable`.
    """
    with reading(WRITTEN, run_id=head.run_id):
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


def _readable(head: RunHead, entry: Entry) -> RunEvent | None:
    """The event; None for an entry that no script has written: the others are shown all the same."""
    try:
        return stored_event(head, entry)
    except RecordUnreadable:
        return None


def history(keys: Keys, run_id: str) -> Plan[list[RunEvent]]:
    """The events of a run that are stored, oldest first; nothing is waited for. Raises `RunNotFound`."""
    head = _head_of(run_id, (yield lambda r: r.hmget(keys("run", run_id), _HEAD_FIELDS)))
    if head is None:
        raise run_not_found(run_id)
    events: list[RunEvent] = []
    start, size = "-", _page_size()
    while page := (
        yield lambda r, start=start, count=size.count: r.xrange(keys("events", run_id), start, "+", count)
    ):
        size.learn(len(page), _bytes_of(page))
        events += [event for event in (_readable(head, entry) for entry in page) if event is not None]
        start = f"({page[-1][0]}"
    return events


def _page_size() -> PageSize:
    return PageSize(first=FIRST_PAGE, most=PAGE)


def _bytes_of(page: Sequence[Entry]) -> int:
    return sum(len(fields.get("payload", "")) for _, fields in page)


class EventCursor:
    """One watcher's place in a run: what it has seen, what it must do next. No input or output of its own.

    `after` is the last event seen before; None means that only what comes from now on is wanted. Feed it the
    run's head, pages of the stream while `behind`, and live messages otherwise, until it is `over`: that is
    after the final event of the life it joined, or once it is certain that this event will not come.
    """

    def __init__(self, after: int | None = 0) -> None:
        self.behind = True
        self.over = False
        self.page_size = _page_size()
        self._wants_the_past = after is not None
        self._wanted = None if after is None else number_of("after", after) + 1
        self._head: RunHead | None = None
        self._life: int | None = None
        self._ends_with_replay = False
        self._passed_over: int | None = None  # the first of the events before `wanted` that cannot be read
        self._known_at: datetime | None = None  # replay has told what was said up to here

    @property
    def wanted(self) -> int:
        """The number of the next event to show."""
        return self._wanted or 1

    def look(self, head: RunHead | None) -> None:
        """Takes where the run stands; the stream is to be read up to here. None: its record is gone."""
        if head is None:
            self.over = True
            return
        self._head = head
        self._life = head.life if self._life is None else self._life
        self._wanted = head.seq + 1 if self._wanted is None else self._wanted
        self._ends_with_replay = head.state.is_terminal or head.life > self._life
        self.behind = True

    def replay(self, page: Sequence[Entry], reply: Mapping[str, str] | None = None) -> Iterator[RunEvent]:
        """Takes a page of the stream, read from `wanted` on, and the reply that was streaming just then."""
        head = self._head
        assert head is not None, "a watcher looks before it reads"
        for id_, fields in page:
            if self.over or int(id_.partition("-")[0]) < self.wanted:
                continue
            event = _readable(head, (id_, fields))
            if event is None:
                self._pass_over(int(id_.partition("-")[0]))
                continue
            yield from self._gap_before(event)
            self._known_at = event.timestamp
            yield self._seen(event)
        asked = self.page_size.count
        self.page_size.learn(len(page), _bytes_of(page))
        if len(page) < asked:
            self.behind = False
            self.over = self.over or self._ends_with_replay
            if reply and self._wants_the_past and not self.over:
                yield self._reply_so_far(reply)

    def live(self, text: str) -> Sequence[RunEvent]:
        """Takes a published message. A jump in its number means that one was lost: the stream has it."""
        try:
            event = RunEvent.from_json(text)
        except (ValueError, RecursionError):
            return ()  # somebody else's message in our channel
        if event.seq is None:
            return (event,) if self._known_at is None or event.timestamp >= self._known_at else ()
        if event.seq == self.wanted:
            return (*self._gap_before(event), self._seen(event))
        if event.seq > self.wanted:
            self.behind = True
        return ()

    def _seen(self, event: RunEvent) -> RunEvent:
        assert event.seq is not None
        self._wanted = event.seq + 1
        self.over = event.final and event.life >= (self._life or 1)
        return event

    def _reply_so_far(self, reply: Mapping[str, str]) -> RunEvent:
        """What was said before this watcher came, as the one piece it would have been."""
        head, attempt = self._head, int(reply["attempt"])
        assert head is not None, "a watcher looks before it reads"
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
        self._known_at = event.timestamp
        return event

    def _pass_over(self, seq: int) -> None:
        """An event that cannot be read; the gap is told with the next one that can."""
        self._passed_over = self._passed_over or self.wanted
        self._wanted = seq + 1

    def _gap_before(self, event: RunEvent) -> Iterator[RunEvent]:
        """What says that events before this one are not there, or cannot be read."""
        assert event.seq is not None
        begin, self._passed_over = self._passed_over or self.wanted, None
        if event.seq > begin:
            gap = {"name": "events.gap", "seq": None, "worker": None, "final": False}
            yield event.model_copy(update={**gap, "payload": {"from": begin, "to": event.seq - 1}})


class _Patience:
    """How long a watch puts up with a Redis that is away. Before its first word from it: not at all."""

    def __init__(self) -> None:
        self._until = 0.0

    def renew(self) -> None:
        self._until = time.monotonic() + RECONNECT_S

    def is_over(self, deadline: float | None) -> bool:
        now = time.monotonic()
        return now >= self._until or (deadline is not None and now >= deadline)


def _counted(cell: Cell, is_wait: bool) -> AbstractContextManager[None]:
    """Room for one watcher more; whoever waits needs none, as each wait has a caller who is held up."""
    return nullcontext() if is_wait else one_more(cell.max_watchers)


def watch(
    store: Store,
    run_id: str,
    after: int | None = 0,
    *,
    silence_s: float = SILENCE_S,
    deadline: float | None = None,
    is_wait: bool = False,
) -> Generator[RunEvent]:
    """A run's events: those stored after number `after` (None: none), then live, until this life is over.

    Closing the generator closes its connection. `deadline` is a time of `time.monotonic()`, after which
    `TimeoutError` is raised. Raises `RunNotFound`, or `RedisUnreachable` when Redis stays away, and
    `TooManyWatchers`: from its first event to its end it is one of so many as the cell allows in a process.
    `is_wait`: somebody waits for the run's end, and is not counted as a watcher.
    """
    with _counted(store.cell, is_wait):
        place, patience = EventCursor(after), _Patience()
        text_of_caller("run_id", run_id)
        channel = _channel(store, run_id, _head(store, run_id))
        while not place.over:
            place.behind = True
            try:
                with _listening(store.cell, channel) as next_message:
                    while not place.over:
                        yield from _news(store, run_id, place, patience, next_message, silence_s, deadline)
            except RedisNoPermission:
                raise  # it would be refused again
            except RedisUnreachable:
                if patience.is_over(deadline):
                    raise
                time.sleep(PAUSE_S)


def _news(
    store: Store,
    run_id: str,
    place: EventCursor,
    patience: _Patience,
    next_message: Callable[[float], str | None],
    silence_s: float,
    deadline: float | None,
) -> Iterable[RunEvent]:
    """What there is to tell next: from the stream when the watcher is behind, else the next message."""
    if place.behind:
        place.look(_head(store, run_id))
        if place.over:
            return ()
        page, reply = _pages(store.ask(lambda r: _page(r, store.keys, run_id, place)))
        patience.renew()
        return place.replay(page, reply)
    text = next_message(_wait_s(time.monotonic() + silence_s, deadline))
    if text is not None:
        return place.live(text)
    place.behind = True  # silence: the stream knows
    return ()


@contextmanager
def _listening(cell: Cell, channel: str) -> Iterator[Callable[[float], str | None]]:
    """A subscription on a connection of its own; gives the next message or, after so many seconds, None."""
    own = Store(cell, max_connections=1)
    pubsub = own.redis.pubsub()  # type: ignore[no-untyped-call]  # redis-py leaves it untyped

    def next_message(timeout_s: float) -> str | None:
        found = own.use(lambda _: pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout_s))
        return None if found is None else str(found["data"])

    try:
        if own.use(lambda _: _subscribed(pubsub, channel)) is None:
            raise _deaf(cell)
        yield next_message
    finally:
        pubsub.close()
        own.close()


def _subscribed(pubsub: Any, channel: str) -> Any:
    """The confirmation; None when nobody says anything."""
    with naming("subscribe", channel):
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
    """As `watch`, for asyncio; bound its time with `asyncio.timeout`.

    All watchers of an event loop share one pub/sub connection. One that is slow holds nobody up and loses
    nothing: it reads on in the stream.
    """
    with _counted(store.cell, is_wait):
        place, patience = EventCursor(after), _Patience()
        text_of_caller("run_id", run_id)
        channel = _channel(store, run_id, await _ahead(store, run_id))
        while not place.over:
            place.behind = True
            try:
                async with listening(store.cell, channel) as inbox:
                    while not place.over:
                        for event in await _anews(store, run_id, place, patience, inbox, silence_s):
                            yield event
            except RedisNoPermission:
                raise  # it would be refused again
            except RedisUnreachable:
                if patience.is_over(None):
                    raise
                await asyncio.sleep(PAUSE_S)


async def _anews(
    store: AsyncStore, run_id: str, place: EventCursor, patience: _Patience, inbox: Inbox, silence_s: float
) -> Iterable[RunEvent]:
    """As `_news`, for asyncio."""
    if place.behind:
        place.look(await _ahead(store, run_id))
        if place.over:
            return ()
        page, reply = _pages(await store.ask(lambda r: _page(r, store.keys, run_id, place)))
        patience.renew()
        return place.replay(page, reply)
    text = await inbox.next(silence_s)
    if text is not None:
        return place.live(text)
    place.behind = True  # silence, or more news than an inbox holds: the stream knows
    return ()


async def _ahead(store: AsyncStore, run_id: str) -> RunHead | None:
    return _head_of(run_id, await _ask(store, lambda r: r.hmget(store.keys("run", run_id), _HEAD_FIELDS)))


_readers: WeakKeyDictionary[Any, asyncio.Semaphore] = WeakKeyDictionary()  # by the client of a loop


async def _ask(store: AsyncStore, question: Callable[[Any], Awaitable[T]]) -> T:
    """A read of a watcher. Only some are made at a time: a crowd would exhaust the store's connections."""
    async with _readers.setdefault(store.redis, asyncio.Semaphore(READERS)):
        return await store.ask(question)


def _head(store: Store, run_id: str) -> RunHead | None:
    return _head_of(run_id, store.ask(lambda r: r.hmget(store.keys("run", run_id), _HEAD_FIELDS)))


def _page(client: Any, keys: Keys, run_id: str, place: EventCursor) -> Any:
    """The next page of the stream, and the reply that streams at that very moment."""
    pipeline = client.pipeline(transaction=True)
    pipeline.xrange(keys("events", run_id), f"{place.wanted}-0", "+", place.page_size.count)
    pipeline.hgetall(keys("reply", run_id))
    return pipeline.execute(raise_on_error=False)


def _pages(answers: Sequence[Any]) -> tuple[Sequence[Entry], Mapping[str, str]]:
    """A key of another type holds nothing of ours: no events, no reply."""
    return or_else(answers[0], []), or_else(answers[1], {})


def _channel(store: Store | AsyncStore, run_id: str, head: RunHead | None) -> str:
    if head is None:
        raise run_not_found(run_id)
    return store.keys.channel(head.agent_id, head.session_id, run_id)


def _wait_s(quiet_until: float, deadline: float | None) -> float:
    now = time.monotonic()
    if deadline is not None and now >= deadline:
        raise TimeoutError
    return max(0.0, min(quiet_until, deadline or quiet_until) - now)


def _deaf(cell: Cell) -> RedisUnreachable:
    return RedisUnreachable(f"Redis at {safe_url(cell.url)} does not answer a subscription")
