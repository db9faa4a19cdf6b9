"""All watchers of one event loop share one connection, and do not affect each other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest

from openagents_worker.errors import RedisUnreachable
from openagents_worker.events import RunEvent
from openagents_worker.producer.client import AsyncClient
from openagents_worker.store import pubsub as channels
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.watch import awatch
from tests.support.lossy_proxy import Proxy
from tests.support.scripts import Hand
from tests.support.waiting import await_for


class Watcher:
    """Watches in a separate task; `lazily` is the pause after every event."""

    def __init__(self, store: AsyncStore, run_id: str = "r1", *, lazily: bool = False) -> None:
        self.seen: list[RunEvent] = []
        self.may_go_on = asyncio.Event()
        if not lazily:
            self.may_go_on.set()
        self.task = asyncio.create_task(self._watch(store, run_id), name=f"watcher of {run_id}")

    async def _watch(self, store: AsyncStore, run_id: str) -> None:
        async with aclosing(awatch(store, run_id)) as events:
            async for event in events:
                self.seen.append(event)
                await self.may_go_on.wait()

    @property
    def numbers(self) -> list[int]:
        return [event.seq for event in self.seen if event.seq is not None]

    async def end(self) -> list[int]:
        """The numbers of all events, once the run is over."""
        async with asyncio.timeout(20):
            await self.task
        return self.numbers


def pubsub_connections(hand: Hand) -> int:
    clients: list[dict[str, Any]] = hand.store.redis.client_list(_type="pubsub")
    return len(clients)


def listeners(hand: Hand, run_id: str = "r1") -> int:
    return int(hand.store.redis.pubsub_numsub(f"oa:events:assistant:s1:{run_id}")[0][1])


async def at_the_same_time(hand: Hand, *names: str) -> None:
    await asyncio.to_thread(hand.emit, "r1", *names)


async def test_five_hundred_watchers_hold_one_connection(hand: Hand, store: AsyncStore) -> None:
    """In Redis's own CLIENT LIST they are one subscriber; each sees its whole run."""
    runs = [f"many-{number}" for number in range(50)]
    for run_id in runs:
        await asyncio.to_thread(hand.submit, run_id, f"session of {run_id}")
    watchers = [Watcher(store, run_id) for run_id in runs for _ in range(10)]
    await await_for(lambda: all(watcher.seen for watcher in watchers), "all have replayed")

    assert pubsub_connections(hand) == 1

    for run_id in runs:
        await asyncio.to_thread(hand.claim, run_id)
        await asyncio.to_thread(hand.finish, run_id)
    assert [await watcher.end() for watcher in watchers] == [[1, 2, 3, 4]] * 500
    await await_for(lambda: pubsub_connections(hand) == 0, "the last watcher has closed it")


async def test_clients_of_one_loop_share_it_too(hand: Hand, redis_url: str) -> None:
    """Each part of an application may have its own client."""
    async with AsyncExitStack() as stack:
        for _ in range(3):
            client = await stack.enter_async_context(AsyncClient(redis_url))
            events = await stack.enter_async_context(aclosing(client.handle("r1").events()))
            await anext(events)

        assert pubsub_connections(hand) == 1


async def test_fifty_watchers_that_join_a_busy_run_miss_nothing(hand: Hand, store: AsyncStore) -> None:
    """They come at random moments, leave and come back; replay and live meet without gap or double."""
    chance, batches = random.Random(11), 300
    joins = sorted(chance.randrange(batches) for _ in range(50))
    watchers: list[Watcher] = []
    passers_by: list[AsyncGenerator[RunEvent]] = []
    for number in range(batches):
        while joins and joins[0] == number:
            joins.pop(0)
            watchers.append(Watcher(store))
            passers_by.append(awatch(store, "r1", chance.randrange(number + 1)))
            await anext(passers_by[-1])
        if passers_by and chance.random() < 0.3:
            await passers_by.pop(chance.randrange(len(passers_by))).aclose()
        await at_the_same_time(hand, *["tool.called"] * chance.randrange(1, 4))
    await asyncio.to_thread(hand.finish, "r1")

    seen = [await watcher.end() for watcher in watchers]
    for events in passers_by:
        await events.aclose()

    last = int(hand.store.redis.hget("oa:run:r1", "seq") or 0)
    assert last > batches
    assert seen == [list(range(1, last + 1))] * 50


@pytest.mark.defect("E08")
async def test_a_slow_watcher_holds_nobody_up_and_loses_nothing(hand: Hand, store: AsyncStore) -> None:
    """While it looks at one event a thousand pass; the others have them at once, it reads them later."""
    slow, quick = Watcher(store, lazily=True), Watcher(store)
    await await_for(lambda: slow.seen and len(quick.seen) == 2, "both watch")

    for _ in range(10):
        await at_the_same_time(hand, *["tool.called"] * (channels.INBOX_MESSAGES // 2))
    await await_for(lambda: len(quick.seen) == 2 + 5 * channels.INBOX_MESSAGES, "the quick one has them all")
    assert len(slow.seen) == 1
    slow.may_go_on.set()
    await asyncio.to_thread(hand.finish, "r1")

    everything = list(range(1, 5 * channels.INBOX_MESSAGES + 5))
    assert await slow.end() == everything
    assert await quick.end() == everything


@pytest.mark.defect("E02b")
async def test_watchers_of_a_run_share_the_work_but_not_the_events(
    hand: Hand, store: AsyncStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message is parsed once for all. What a fast watcher changes in its events, a slow one never sees."""
    slow, watchers = Watcher(store, lazily=True), [Watcher(store) for _ in range(5)]
    await await_for(lambda: slow.seen and all(len(each.seen) == 2 for each in watchers), "all watch")
    parsed: list[str] = []
    from_json = RunEvent.from_json
    monkeypatch.setattr(RunEvent, "from_json", lambda text: parsed.append(text) or from_json(text))

    await at_the_same_time(hand, *["tool.called"] * 20)
    await await_for(lambda: all(len(each.seen) == 22 for each in watchers), "the fast ones have them all")
    for watcher in watchers:
        for event in watcher.seen:
            event.payload["changed"] = True
    slow.may_go_on.set()
    await await_for(lambda: len(slow.seen) == 22, "the slow one has them, too")

    assert not [event for event in slow.seen[2:] if "changed" in event.payload]
    assert len(parsed) == 20
    await asyncio.to_thread(hand.finish, "r1")
    everything = list(range(1, 25))
    assert [await watcher.end() for watcher in [slow, *watchers]] == [everything] * 6


async def test_when_the_connection_breaks_every_watcher_catches_up(hand: Hand, store: AsyncStore) -> None:
    """Missed events are read from the stream; after that the watchers share a connection again."""
    watchers = [Watcher(store) for _ in range(20)]
    await await_for(lambda: all(len(watcher.seen) == 2 for watcher in watchers), "all watch")

    for _ in range(3):
        await asyncio.to_thread(hand.store.redis.client_kill_filter, _type="pubsub")
        await at_the_same_time(hand, "tool.called", "tool.succeeded")
    await await_for(lambda: all(len(watcher.seen) == 8 for watcher in watchers), "all have caught up")
    assert pubsub_connections(hand) == 1
    await asyncio.to_thread(hand.finish, "r1")

    assert [await watcher.end() for watcher in watchers] == [list(range(1, 11))] * 20


async def test_a_run_that_nobody_watches_any_more_is_unsubscribed(hand: Hand, store: AsyncStore) -> None:
    """Redis does not send events without a reader; a reader that comes back is subscribed again."""
    await asyncio.to_thread(hand.submit, "r2", "s1")
    other = Watcher(store, "r2")
    await await_for(lambda: listeners(hand, "r2") == 1, "somebody watches r2")

    for _ in range(3):
        async with aclosing(awatch(store, "r1")) as events:
            await anext(events)
            assert (listeners(hand), pubsub_connections(hand)) == (1, 1)
        await await_for(lambda: listeners(hand) == 0, "nobody watches r1")

    assert listeners(hand, "r2") == 1
    other.task.cancel()
    await asyncio.wait([other.task])


async def test_leaving_and_coming_back_at_once_loses_nothing(hand: Hand, store: AsyncStore) -> None:
    """A confirmation of the subscription before is not taken for that of this one."""
    other = Watcher(store)
    await asyncio.to_thread(hand.submit, "r2", "s2")
    await asyncio.to_thread(hand.claim, "r2")

    for number in range(30):
        async with aclosing(awatch(store, "r2", 2 + number)) as events:
            listening = asyncio.ensure_future(anext(events))
            await await_for(lambda: listeners_of_second(hand) == 1, "it listens")
            await asyncio.to_thread(hand.emit, "r2", f"note.{number}")
            assert (await asyncio.wait_for(listening, 60)).name == f"note.{number}"

    await asyncio.to_thread(hand.finish, "r1")
    await asyncio.to_thread(hand.finish, "r2")
    await other.end()


def listeners_of_second(hand: Hand) -> int:
    return int(hand.store.redis.pubsub_numsub("oa:events:assistant:s2:r2")[0][1])


async def test_a_connection_that_has_fallen_silent_is_given_up(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-open connection is silent forever. It is probed, does not answer, and is replaced."""
    monkeypatch.setattr(channels, "PROBE_S", 0.1)
    monkeypatch.setattr(channels, "PROBE_ANSWER_S", 0.1)
    async with Proxy(hand.store.cell.url) as proxy:
        store = AsyncStore(Cell(proxy.url))
        watcher = Watcher(store)
        await await_for(lambda: len(watcher.seen) == 2, "it watches")
        proxy.swallow = lambda data: b"oa:events" in data
        await at_the_same_time(hand, "tool.called")
        proxy.swallow = lambda data: b"subscribe" in data
        await asyncio.to_thread(hand.emit, "r1", "tool.succeeded")
        await await_for(lambda: len(watcher.seen) >= 3, "the silence was noticed")
        proxy.swallow = lambda data: False
        await asyncio.to_thread(hand.finish, "r1")

        assert await watcher.end() == [1, 2, 3, 4, 5, 6]
        await store.close()


async def test_a_redis_that_confirms_nothing_is_unreachable(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better an error than a watcher that is deaf."""
    monkeypatch.setattr(channels, "SUBSCRIBE_TIMEOUT_S", 0.1)
    async with Proxy(hand.store.cell.url) as proxy:
        store = AsyncStore(Cell(proxy.url))
        proxy.swallow = lambda data: b"subscribe" in data

        with pytest.raises(RedisUnreachable, match="does not answer a subscription"):
            [event async for event in awatch(store, "r1")]

        await store.close()
