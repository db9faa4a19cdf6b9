"""The rescue: runs of dead workers, due runs and lost messages come back; nothing else is touched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import pytest

from openagents_worker.concurrency import end_task
from openagents_worker.errors import RedisUnreachable
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.scripts import Wake
from openagents_worker.worker.backlog import EMPTY
from openagents_worker.worker.local_processes import ProcessIdentity
from openagents_worker.worker.rescue import Rescue
from tests.producer.hand import Hand
from tests.waiting import await_for

T = TypeVar("T")


class Queues:
    """A broker whose oldest message is what the test says."""

    oldest: int | None = EMPTY
    asked = 0

    async def oldest_us(self, queue: str) -> int | None:
        self.asked += 1
        return self.oldest


@pytest.fixture
def queues() -> Queues:
    return Queues()


@pytest.fixture
async def store(cell: Cell) -> AsyncGenerator[AsyncStore]:
    store = AsyncStore(cell)
    yield store
    await store.close()


@pytest.fixture
def rescue(store: AsyncStore, queues: Queues, sent: list[Wake]) -> Rescue:
    return rescue_of(store, queues, sent)


def rescue_of(
    store: AsyncStore,
    queues: Queues,
    sent: list[Wake],
    *,
    grace_s: float = 0.2,
    max_recoveries: int = 5,
    lease_ms: int = 1_000,
) -> Rescue:
    async def send(wakes: Sequence[Wake]) -> None:
        sent.extend(wakes)

    return Rescue(
        store=store,
        backlog=queues,
        send_wakes=send,
        queues=["agents"],
        lease_ms=lease_ms,
        heartbeat_ms=lease_ms // 4,
        max_recoveries=max_recoveries,
        grace_s=grace_s,
    )


@pytest.fixture
async def running(rescue: Rescue) -> AsyncGenerator[Rescue]:
    task = asyncio.create_task(rescue.run(), name="rescue")
    yield rescue
    await end_task(task)


def dies(hand: Hand, *run_ids: str, lease_ms: int = 1) -> None:
    """A worker that has claimed these runs, and whose heart stops beating."""
    own, hand.incarnation = hand.incarnation, "dead:1"
    hand.store.run(scripts.register(incarnation="dead:1", lease_ms=60_000, agents=[]))
    for number, run_id in enumerate(run_ids):
        hand.submit(run_id, f"s{number}")
        hand.claim(run_id)
    deadline = scripts.register(incarnation="dead:1", lease_ms=lease_ms, agents=[])
    hand.store.run(deadline)
    hand.incarnation = own


def waits(sent: list[Wake], *run_ids: str) -> Callable[[], bool]:
    return lambda: sorted(wake.run_id for wake in sent) == sorted(run_ids)


async def test_the_runs_of_a_dead_worker_are_woken(running: Rescue, hand: Hand, sent: list[Wake]) -> None:
    """Within the lease and a second, whoever looks after the cell."""
    dies(hand, "r1", "r2", "r3")

    await await_for(waits(sent, "r1", "r2", "r3"), "all three were woken once")


HERE = ProcessIdentity("this host", "11 500")


def registers(hand: Hand, incarnation: str, *run_ids: str) -> None:
    """A worker of this host with a lease of ten minutes, that has claimed these runs."""
    own, hand.incarnation = hand.incarnation, incarnation
    hand.store.run(
        scripts.register(
            incarnation=incarnation, lease_ms=600_000, agents=[], host=HERE.host, process=HERE.process
        )
    )
    for number, run_id in enumerate(run_ids):
        hand.submit(run_id, f"{incarnation}-{number}")
        hand.claim(run_id)
    hand.incarnation = own


async def test_the_runs_of_a_worker_whose_process_is_dead_do_not_wait_for_its_lease(
    running: Rescue, hand: Hand, sent: list[Wake]
) -> None:
    """Its lease is ended, and a rescue that sleeps until the next one would end wakes up for it."""
    registers(hand, "dead:1", "r1", "r2")
    registers(hand, "alive:1", "r3")

    running.note_dead({"dead:1": HERE})

    await await_for(waits(sent, "r1", "r2"), "both were woken")
    assert not hand.store.run(scripts.renew(incarnation="alive:1", lease_ms=1_000)).lost
    hand.store.run(scripts.retire(incarnation="alive:1"))


async def test_a_death_that_is_told_while_the_leases_are_looked_at_is_not_overlooked(
    store: AsyncStore, queues: Queues, sent: list[Wake], hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That look finds every lease good, and would have the next one be when the first of them ends."""
    registers(hand, "dead:1", "r1")
    rescue = rescue_of(store, queues, sent, lease_ms=600_000)
    next_lease_end = rescue._next_lease_end

    async def next_lease_end_while_somebody_dies() -> float | None:
        found = await next_lease_end()
        monkeypatch.undo()
        rescue.note_dead({"dead:1": HERE})
        return found

    monkeypatch.setattr(rescue, "_next_lease_end", next_lease_end_while_somebody_dies)
    task = asyncio.create_task(rescue.run(), name="rescue")
    await await_for(waits(sent, "r1"), "its run was woken")
    await end_task(task)


async def test_a_death_that_cannot_be_told_is_told_later(
    store: AsyncStore, queues: Queues, sent: list[Wake], hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis is away at that moment: nothing is forgotten."""
    registers(hand, "dead:1", "r1")
    rescue, refuses = rescue_of(store, queues, sent), True
    run = store.run

    async def run_or_refuse(call: Any) -> Any:
        if refuses and call.script.name == "end_lease":
            raise RedisUnreachable("away")
        return await run(call)

    monkeypatch.setattr(store, "run", run_or_refuse)
    rescue.note_dead({"dead:1": HERE})
    with pytest.raises(RedisUnreachable):
        await rescue._pass()
    refuses = False
    await rescue._pass()

    assert waits(sent, "r1")()


async def test_a_worker_that_is_alive_keeps_its_runs(running: Rescue, hand: Hand, sent: list[Wake]) -> None:
    """Only the end of a lease gives runs away."""
    hand.submit("mine", "s9")
    hand.claim("mine")

    dies(hand, "r1")
    await await_for(waits(sent, "r1"), "the other worker's run was woken")

    assert hand.store.ask(lambda r: r.hget(hand.store.keys("run", "mine"), "state")) == "running"


async def test_more_runs_than_a_call_takes_are_all_woken(
    rescue: Rescue, hand: Hand, sent: list[Wake]
) -> None:
    """A worker with hundreds of runs is taken in calls of a hundred."""
    run_ids = [f"r{number}" for number in range(250)]
    await asyncio.to_thread(dies, hand, *run_ids)
    await rescue.once()

    assert waits(sent, *run_ids)()


async def test_a_retry_is_woken_when_it_is_due_and_not_before(
    running: Rescue, hand: Hand, sent: list[Wake]
) -> None:
    """Its time is a floor: a provider that said when to come again is not asked earlier."""
    hand.submit("r1")
    hand.claim("r1")
    hand.retry("r1", delay_ms=400)
    due_ms = int(hand.store.ask(lambda r: r.hget(hand.store.keys("run", "r1"), "due")))

    await await_for(waits(sent, "r1"), "the run was woken")

    assert sent[0].sent_us >= due_ms * 1000, "both by Redis's clock"


async def test_a_lost_message_is_sent_again_once(
    running: Rescue, hand: Hand, queues: Queues, sent: list[Wake]
) -> None:
    """Sent longer ago than the grace, and older than all that still waits: it must be lost."""
    hand.submit("r1")

    await await_for(waits(sent, "r1"), "the run was woken")


async def test_a_message_behind_an_older_one_is_not_sent_again(
    rescue: Rescue, hand: Hand, queues: Queues, sent: list[Wake]
) -> None:
    """A long queue is no loss: a run is missed only when nothing older waits."""
    queues.oldest = 1
    hand.submit("r1")
    await await_for(lambda: grace_is_over(hand), "the grace is over")

    assert await rescue.once() == 0

    queues.oldest = EMPTY
    assert await rescue.once() == 1


async def test_where_the_queue_cannot_be_read_sending_again_becomes_rare(
    rescue: Rescue, hand: Hand, queues: Queues, sent: list[Wake]
) -> None:
    """A run's grace doubles each time it is sent, so that a long queue is not flooded with doubles."""
    queues.oldest = None
    hand.submit("r1")
    await await_for(lambda: grace_is_over(hand), "the grace is over")
    assert await rescue.once() == 1

    await await_for(lambda: grace_is_over(hand), "the first grace is over again")

    assert await rescue.once() == 0
    await await_for(partial(_brought_back, rescue), "after twice the grace it is sent again")
    assert waits(sent, "r1", "r1")()


async def test_where_the_queue_cannot_be_read_a_new_run_does_not_wait_for_an_old_one(
    rescue: Rescue, hand: Hand, queues: Queues, sent: list[Wake]
) -> None:
    """Each has a grace of its own, however often others were sent."""
    queues.oldest = None
    hand.submit("old")
    for times in (1, 2, 3):
        await await_for(partial(_brought_back, rescue), f"it is sent again, {times}")
    hand.submit("new", "s2")

    await await_for(partial(_brought_back, rescue), "one of them is sent again")

    assert [wake.run_id for wake in sent][:4] == ["old", "old", "old", "new"]


async def test_a_run_that_kills_its_workers_is_ended(
    store: AsyncStore, queues: Queues, sent: list[Wake], hand: Hand
) -> None:
    """After so many recoveries without a step in between it is poisoned, unless Redis itself was away."""
    rescue = rescue_of(store, queues, sent, max_recoveries=1)
    hand.submit("r1", "s0")
    for after, ago_ms in (("queued", 60_000), ("failed", 0)):  # not together: that would be Redis's silence
        own, hand.incarnation = hand.incarnation, f"dead:{after}"
        hand.store.run(scripts.register(incarnation=hand.incarnation, lease_ms=60_000, agents=[]))
        hand.claim("r1")
        hand.store.run(scripts.register(incarnation=hand.incarnation, lease_ms=-ago_ms, agents=[]))
        hand.incarnation = own

        await rescue.once()

        assert hand.store.ask(lambda r: r.hget(hand.store.keys("run", "r1"), "state")) == after


async def test_an_idle_cell_is_asked_little(store: AsyncStore, sent: list[Wake], hand: Hand) -> None:
    """What says when it will be due is not asked before: some two commands a second are left."""
    asked = 0
    now_s = 0.0

    class Counted(AsyncStore):
        async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
            nonlocal asked
            asked += 1
            return await super().ask(question)

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        if now_s > 10:
            raise asyncio.CancelledError

    counted = Counted(store.cell)
    rescue = Rescue(
        store=counted,
        backlog=Queues(),
        send_wakes=nobody,
        queues=["agents"],
        lease_ms=10_000,
        heartbeat_ms=2_500,
        max_recoveries=5,
        clock=lambda: now_s,
        sleep=sleep,
    )
    with suppress(asyncio.CancelledError):
        await rescue.run()
    await counted.close()

    assert asked < 25


async def _brought_back(rescue: Rescue) -> bool:
    return await rescue.once() > 0


async def nobody(wakes: Sequence[Wake]) -> None:
    assert not wakes, "nobody was to be woken"


def grace_is_over(hand: Hand) -> bool:
    """Whether the oldest wake-up was sent longer ago than the grace of these tests, by Redis's clock."""
    seconds, micros = hand.store.ask(lambda r: r.time())
    first = hand.store.ask(lambda r: r.zrange(hand.store.keys("sent", "agents"), 0, 0, withscores=True))
    return bool(seconds * 1_000_000 + micros - first[0][1] > 200_000)


async def test_what_has_expired_goes_out_of_the_lists(
    redis_url: str, sent: list[Wake], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker sees to it now and then; no process of its own is needed."""
    monkeypatch.setattr("openagents_worker.worker.rescue.PRUNE_PERIOD_S", 0.2)
    store = AsyncStore(Cell(redis_url, run_ttl_ms=100, session_ttl_ms=100))
    with Hand(redis_url, run_ttl_ms=100, session_ttl_ms=100) as hand:
        hand.end("r1", steps=1)
        assert hand.store.redis.exists(hand.store.keys("index", "all"))
        task = asyncio.create_task(rescue_of(store, Queues(), sent).run())
        await await_for(lambda: not hand.store.redis.keys("oa:index*"), "no list is left")
        await end_task(task)
    await store.close()
