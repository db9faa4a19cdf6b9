"""Watching a run: every stored event once and in order, whenever the watcher joins."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Generator, Sequence
from contextlib import aclosing, closing

import hypothesis.strategies as st
import pytest
from hypothesis import given

from openagents_worker.errors import RedisUnreachable, RunNotFound
from openagents_worker.events import RunEvent
from openagents_worker.models import RunState
from openagents_worker.store.client import AsyncStore, Cell, Store
from openagents_worker.store.event_cursor import EventCursor, RunHead
from openagents_worker.store.published import PublishedMessage
from openagents_worker.store.watch import awatch, watch
from tests.support.lossy_proxy import Proxy, closed_port
from tests.support.scripts import Hand
from tests.support.waiting import await_for, wait_for

EVENTS = 400


@pytest.fixture
def hand(redis_url: str) -> Generator[Hand]:
    with Hand(redis_url) as hand:
        hand.submit("r1")
        hand.claim("r1")
        yield hand


def numbers(events: Sequence[RunEvent]) -> list[int | None]:
    return [event.seq for event in events]


def has_listener(hand: Hand) -> bool:
    return bool(hand.store.redis.pubsub_channels("oa:events:*"))


class Watcher(threading.Thread):
    """Watches in its own thread and keeps the events."""

    def __init__(self, store: Store, after: int | None = 0, *, silence_s: float = 15.0) -> None:
        super().__init__(daemon=True)
        self.store = store
        self.seen: list[RunEvent] = []
        self._events = watch(store, "r1", after, silence_s=silence_s)
        self.start()

    def run(self) -> None:
        self.seen.extend(self._events)

    def all(self) -> list[RunEvent]:
        self.join(10)
        assert not self.is_alive(), "the watch did not end"
        return self.seen


def test_a_run_that_is_over_is_replayed_and_the_watch_ends(hand: Hand) -> None:
    """Watching a finished run shows all its events and stops after the one marked final."""
    hand.emit("r1", "llm.called")
    hand.finish("r1")

    events = list(watch(hand.store, "r1"))

    assert [event.name for event in events] == [
        "run.queued",
        "run.attempt_started",
        "llm.called",
        "run.completed",
        "session.run.completed",
    ]
    assert numbers(events) == [1, 2, 3, 4, 5]
    assert events[-1].final


def test_a_watcher_continues_where_it_stopped(hand: Hand) -> None:
    """`after` is the number of the last event seen; after the last event there are none."""
    hand.finish("r1")

    assert numbers(list(watch(hand.store, "r1", after=2))) == [3, 4]
    assert list(watch(hand.store, "r1", after=4)) == []


async def test_watchers_that_join_at_any_moment_see_every_event_once_in_order(hand: Hand) -> None:
    """Twenty watchers join while events are appended: replay, then live, without gaps or duplicates."""
    chance = random.Random(7)
    joins = sorted(chance.randrange(EVENTS) for _ in range(20))

    async def one(store: AsyncStore) -> list[RunEvent]:
        return [event async for event in awatch(store, "r1")]

    async with asyncio.TaskGroup() as group:
        store = AsyncStore(hand.store.cell)
        watchers = []
        for number in range(EVENTS):
            while joins and joins[0] == number:
                joins.pop(0)
                watchers.append(group.create_task(one(store), name=f"watcher {len(watchers)}"))
            await asyncio.to_thread(hand.emit, "r1", "tool.called", "tool.succeeded")
        await asyncio.to_thread(hand.finish, "r1")
    await store.close()

    wanted = list(range(1, 2 * EVENTS + 5))
    assert len(watchers) == 20
    assert all(numbers(watcher.result()) == wanted for watcher in watchers)


def test_the_sync_watch_follows_a_run_live(hand: Hand) -> None:
    """The watcher in the thread gets events that are appended after it joined, including deltas."""
    watcher = Watcher(hand.store)
    wait_for(lambda: len(watcher.seen) == 2 and has_listener(hand), "the watcher has replayed")

    hand.delta("r1", "4")
    hand.emit("r1", "llm.succeeded")
    hand.finish("r1")

    events = watcher.all()
    assert numbers(events) == [1, 2, None, 3, 4, 5]
    assert events[2].name == "llm.delta"
    assert events[2].payload["text"] == "4"


def test_events_that_were_trimmed_are_announced_as_a_gap(hand: Hand) -> None:
    """A stream is bounded; a watcher that joins too late learns which events are missing."""
    hand.emit("r1", *["tool.called"] * 10)
    hand.finish("r1")
    hand.store.redis.xtrim(hand.store.keys("events", "r1"), minid="9-0", approximate=False)

    events = list(watch(hand.store, "r1", after=3))

    assert (events[0].name, events[0].seq, events[0].payload) == ("events.gap", None, {"from": 4, "to": 8})
    assert numbers(events[1:]) == [9, 10, 11, 12, 13, 14]


def test_a_replay_longer_than_a_page_is_complete(hand: Hand) -> None:
    """Long runs are read in pages; no event is lost between two pages."""
    hand.emit("r1", *["tool.called"] * 997)
    hand.emit("r1", *["tool.called"] * 3)
    hand.finish("r1")

    assert numbers(list(watch(hand.store, "r1"))) == list(range(1, 1005))


def test_an_end_that_pub_sub_lost_is_found_after_silence(hand: Hand) -> None:
    """Pub/sub may lose messages: after a silence, the watcher reads the record and the stream."""
    with Proxy(hand.store.cell.url) as proxy:
        watcher = Watcher(Store(Cell(proxy.url)), silence_s=0.2)
        wait_for(lambda: len(watcher.seen) == 2, "the watcher has replayed")
        proxy.swallow = lambda data: b"oa:events" in data

        hand.finish("r1")

        assert numbers(watcher.all()) == [1, 2, 3, 4]
        watcher.store.close()


def test_a_watch_without_a_final_event_ends_with_the_run(hand: Hand) -> None:
    """The last events of the ended run were trimmed, so no more events will arrive."""
    hand.finish("r1")
    hand.store.redis.xdel(hand.store.keys("events", "r1"), "3-0", "4-0")

    assert numbers(list(watch(hand.store, "r1"))) == [1, 2]


def test_a_watch_of_a_run_that_vanishes_raises(hand: Hand) -> None:
    """Redis has lost its data, or the run was deleted. Without a final event, nothing has ended."""
    events = watch(hand.store, "r1", silence_s=0.2)
    assert numbers([next(events), next(events)]) == [1, 2]

    hand.store.redis.flushall()

    with pytest.raises(RunNotFound):
        next(events)


async def test_an_async_watch_of_a_run_that_vanishes_raises(hand: Hand) -> None:
    """The same for asyncio."""
    store = AsyncStore(hand.store.cell)
    async with aclosing(awatch(store, "r1", silence_s=0.2)) as events:
        assert numbers([await anext(events), await anext(events)]) == [1, 2]

        await asyncio.to_thread(hand.store.redis.flushall)

        with pytest.raises(RunNotFound):
            await anext(events)
    await store.close()


def test_a_watch_survives_a_lost_connection(hand: Hand) -> None:
    """The watcher subscribes again and misses nothing."""
    watcher = Watcher(hand.store)
    wait_for(lambda: len(watcher.seen) == 2 and has_listener(hand), "the watcher listens")

    hand.store.redis.client_kill_filter(_type="pubsub")
    hand.emit("r1", "tool.called")
    hand.finish("r1")

    assert numbers(watcher.all()) == [1, 2, 3, 4, 5]


async def test_an_async_watch_survives_a_lost_connection(hand: Hand) -> None:
    """The same for asyncio."""
    store = AsyncStore(hand.store.cell)
    seen: list[RunEvent] = []

    async def follow() -> None:
        async for event in awatch(store, "r1"):
            seen.append(event)

    following = asyncio.create_task(follow(), name="watcher")
    await await_for(lambda: len(seen) == 2 and has_listener(hand), "the watcher listens")

    await asyncio.to_thread(hand.store.redis.client_kill_filter, _type="pubsub")
    await asyncio.to_thread(hand.finish, "r1")

    await asyncio.wait_for(following, 60)
    await store.close()
    assert numbers(seen) == [1, 2, 3, 4]


def test_a_watcher_that_leaves_early_leaves_no_connection(hand: Hand) -> None:
    """Closing the generator closes its subscription."""
    with closing(watch(hand.store, "r1")) as events:
        next(events)
        assert has_listener(hand)

    wait_for(lambda: not has_listener(hand), "the subscription is gone")


async def test_an_async_watcher_that_leaves_early_leaves_no_connection(hand: Hand) -> None:
    """Closing the async generator closes its subscription."""
    store = AsyncStore(hand.store.cell)
    async with aclosing(awatch(store, "r1")) as events:
        await anext(events)
        assert has_listener(hand)

    await await_for(lambda: not has_listener(hand), "the subscription is gone")
    await store.close()


def test_without_a_number_only_new_events_are_returned(hand: Hand) -> None:
    """`after=None` leaves out the stored events."""
    watcher = Watcher(hand.store, None)
    wait_for(lambda: hand.delta("r1", "4") or watcher.seen, "the watcher hears what is live")

    hand.finish("r1")

    assert [number for number in numbers(watcher.all()) if number] == [3, 4]


def test_a_deadline_ends_the_wait(hand: Hand) -> None:
    """A watch whose deadline has passed raises TimeoutError and closes its connection."""
    with pytest.raises(TimeoutError):
        list(watch(hand.store, "r1", None, deadline=0.0))

    wait_for(lambda: not has_listener(hand), "the subscription is gone")


def test_an_unknown_run_cannot_be_watched(redis_url: str) -> None:
    """An unknown id raises immediately."""
    store = Store(Cell(redis_url))
    with pytest.raises(RunNotFound, match="nobody"):
        list(watch(store, "nobody"))
    store.close()


def test_a_redis_that_never_answered_raises_immediately() -> None:
    """A watch reconnects only to a Redis that has answered before."""
    store = Store(Cell(f"redis://127.0.0.1:{closed_port()}/0"))
    with pytest.raises(RedisUnreachable):
        list(watch(store, "r1"))
    store.close()


# --- the state machine alone -----------------------------------------------------------------------------


def event(seq: int | None, name: str = "tool.called", *, life: int = 1, final: bool = False) -> RunEvent:
    return RunEvent.model_validate(
        {
            "name": name,
            "seq": seq,
            "run_id": "r1",
            "session_id": "s1",
            "agent_id": "a1",
            "life": life,
            "attempt": 1,
            "timestamp": "2026-01-01T00:00:00.000Z",
            "final": final,
        }
    )


def head(seq: int, state: RunState = RunState.RUNNING, life: int = 1) -> RunHead:
    return RunHead("r1", state, seq, life, "a1", "s1")


def page(*events: RunEvent) -> list[tuple[str, dict[str, str]]]:
    return [(f"{one.seq}-0", _fields(one)) for one in events]


def _fields(event: RunEvent) -> dict[str, str]:
    """The fields of a stored event."""
    return {
        "name": event.name,
        "life": str(event.life),
        "attempt": str(event.attempt),
        "worker": event.worker or "",
        "at": str(round(event.timestamp.timestamp() * 1000)),
        "final": "1" if event.final else "0",
        "payload": json.dumps(event.payload),
    }


def test_a_jump_in_live_numbers_sends_the_watcher_back_to_the_stream() -> None:
    """A message that pub/sub lost is read from the stream, before later events."""
    cursor = EventCursor()
    cursor.set_head(head(1))
    assert numbers(list(cursor.replay(page(event(1))))) == [1]

    assert list(cursor.live(PublishedMessage(event(3).to_json()))) == []
    assert cursor.is_behind

    assert numbers(list(cursor.replay(page(event(2), event(3))))) == [2, 3]
    assert list(cursor.live(PublishedMessage(event(3).to_json()))) == []
    assert numbers(list(cursor.live(PublishedMessage(event(4).to_json())))) == [4]


def test_a_watcher_ends_with_the_life_it_joined() -> None:
    """For a watcher that joins in the second life, the final event of the first one is history."""
    cursor = EventCursor()
    cursor.set_head(head(2, life=2))

    shown = list(cursor.replay(page(event(1, final=True), event(2, "run.resumed", life=2))))
    assert numbers(shown) == [1, 2]
    assert not cursor.is_over

    assert numbers(list(cursor.live(PublishedMessage(event(3, life=2, final=True).to_json())))) == [3]
    assert cursor.is_over


def test_nothing_is_shown_after_the_final_event() -> None:
    """Events of a later life in the same page are for other watchers."""
    cursor = EventCursor()
    cursor.set_head(head(1))

    shown = list(cursor.replay(page(event(1, final=True), event(2, "run.resumed", life=2))))

    assert numbers(shown) == [1]
    assert cursor.is_over


@given(
    joined=st.integers(0, 30),
    lost=st.sets(st.integers(1, 30)),
    looks=st.sets(st.integers(1, 30)),
    after=st.integers(0, 10),
)
def test_whatever_pub_sub_loses_every_event_is_seen_once_in_order(
    joined: int, lost: set[int], looks: set[int], after: int
) -> None:
    """Joined at any moment, with lost messages and reads at any time: nothing is missing or duplicated."""
    stream: list[RunEvent] = []
    seen: list[RunEvent] = []
    cursor = EventCursor(after)

    def read_on() -> None:
        while cursor.is_behind and not cursor.is_over:
            seen.extend(cursor.replay(page(*stream[cursor.next_seq - 1 :])))

    for number in range(1, 32):
        if number - 1 == joined:
            cursor.set_head(head(len(stream)))
            read_on()
        stream.append(event(number, final=number == 31))
        if number > joined:
            if number not in lost:
                seen.extend(cursor.live(PublishedMessage(stream[-1].to_json())))
            if number in looks and not cursor.is_over:
                cursor.set_head(head(len(stream), RunState.COMPLETED if number == 31 else RunState.RUNNING))
            read_on()

    assert cursor.is_over
    assert numbers(seen) == list(range(after + 1, 32))
