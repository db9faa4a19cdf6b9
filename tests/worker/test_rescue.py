"""The rescue loop: it recovers runs of dead workers, due runs and lost messages, and nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import pytest

from openagents_worker.concurrency import end_task
from openagents_worker.errors import RedisUnreachable
from openagents_worker.llm.transcript import INTERRUPTED
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore, Cell
from openagents_worker.store.roles import ROLES, RoleName, acl_line
from openagents_worker.store.scripts import Wake
from openagents_worker.worker.backlog import EMPTY
from openagents_worker.worker.local_processes import ProcessIdentity
from openagents_worker.worker.rescue import Rescue, RescueClock, RescueLimits
from tests.support.scripts import Hand
from tests.support.waiting import await_for

T = TypeVar("T")


class Queues:
    """A broker whose oldest message is set by the test."""

    oldest: int | None = EMPTY
    queries = 0

    async def oldest_us(self, queue: str) -> int | None:
        self.queries += 1
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
    return new_rescue(store, queues, sent)


def new_rescue(
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
        store,
        backlog=queues,
        send_wakes=send,
        queues=["agents"],
        limits=RescueLimits(
            lease_ms=lease_ms,
            heartbeat_ms=lease_ms // 4,
            max_recoveries=max_recoveries,
            grace_s=grace_s,
        ),
    )


@pytest.fixture
async def running(rescue: Rescue) -> AsyncGenerator[Rescue]:
    task = asyncio.create_task(rescue.run(), name="rescue")
    yield rescue
    await end_task(task)


def register_dying_worker(hand: Hand, *run_ids: str, lease_ms: int = 1) -> None:
    """Register a worker that has claimed these runs and does not renew its lease."""
    own, hand.incarnation = hand.incarnation, "dead:1"
    hand.store.run(scripts.register(incarnation="dead:1", lease_ms=60_000, agents=[]))
    for number, run_id in enumerate(run_ids):
        hand.submit(run_id, f"s{number}")
        hand.claim(run_id)
    deadline = scripts.register(incarnation="dead:1", lease_ms=lease_ms, agents=[])
    hand.store.run(deadline)
    hand.incarnation = own


def was_sent(sent: list[Wake], *run_ids: str) -> Callable[[], bool]:
    return lambda: sorted(wake.run_id for wake in sent) == sorted(run_ids)


@pytest.mark.parametrize("request_is_readable", [True, False])
async def test_an_interrupted_run_that_does_not_end_is_ended_by_force(
    running: Rescue, store: AsyncStore, hand: Hand, sent: list[Wake], request_is_readable: bool
) -> None:
    """The session gets its question, if it can be read, and goes to the next run."""
    hand.submit("r1")
    hand.claim("r1")
    if not request_is_readable:
        hand.store.redis.hset(hand.store.keys("run", "r1"), "request", "{")
    hand.submit("r2", interrupts="interrupt")
    hand.store.redis.hset(hand.store.keys("run", "r1"), "force_at", 1)
    hand.store.redis.zadd(hand.store.keys("due"), {"r1": 1})

    await await_for(was_sent(sent, "r2"), "the next run was woken")
    state, reason = hand.store.redis.hmget(hand.store.keys("run", "r1"), "state", "cancel_reason")
    assert (state, reason) == ("cancelled", "interrupted by the run r2")
    stored = hand.store.redis.lrange(hand.store.keys("transcript", "s1"), 0, -1)
    entries = [json.loads(text) for text in stored]
    expected = ["hi", INTERRUPTED] if request_is_readable else []
    assert [entry["content"] for entry in entries] == expected


async def test_the_runs_of_a_dead_worker_are_woken(running: Rescue, hand: Hand, sent: list[Wake]) -> None:
    """Within the lease and one second, by any worker of the cell."""
    register_dying_worker(hand, "r1", "r2", "r3")

    await await_for(was_sent(sent, "r1", "r2", "r3"), "all three were woken once")


async def test_the_runs_of_a_dead_worker_are_woken_by_a_user_without_optional_rights(
    cell: Cell, hand: Hand, queues: Queues, sent: list[Wake]
) -> None:
    """Such as INFO: all that a worker may be refused is refused here."""
    needed_only = replace(ROLES[RoleName.WORKER], optional=frozenset())
    user, *words = acl_line(needed_only, password="pw", prefix=cell.prefix).split()[1:]
    hand.store.redis.execute_command("ACL", "SETUSER", user, *words)
    register_dying_worker(hand, "r1")
    store = AsyncStore(replace(cell, url=cell.url.replace("://", f"://{user}:pw@")))
    task = asyncio.create_task(new_rescue(store, queues, sent).run(), name="rescue")
    await await_for(was_sent(sent, "r1"), "the run was woken")
    await end_task(task)
    await store.close()
    hand.store.redis.execute_command("ACL", "DELUSER", user)


HERE = ProcessIdentity("this host", "11 500")


def register_worker(hand: Hand, incarnation: str, *run_ids: str) -> None:
    """Register a worker of this host with a lease of ten minutes that has claimed these runs."""
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
    """Its lease is ended, and a rescue loop that sleeps until the next lease expiry wakes up."""
    register_worker(hand, "dead:1", "r1", "r2")
    register_worker(hand, "alive:1", "r3")

    running.note_dead({"dead:1": HERE})

    await await_for(was_sent(sent, "r1", "r2"), "both were woken")
    assert not hand.store.run(scripts.renew(incarnation="alive:1", lease_ms=1_000)).lost
    hand.store.run(scripts.retire(incarnation="alive:1"))


async def test_a_death_that_is_reported_during_a_check_of_the_leases_is_handled(
    store: AsyncStore, queues: Queues, sent: list[Wake], hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That check finds every lease valid, and would schedule the next check at the first expiry."""
    register_worker(hand, "dead:1", "r1")
    rescue = new_rescue(store, queues, sent, lease_ms=600_000)
    next_lease_end = rescue._next_lease_end

    async def next_lease_end_during_a_death() -> float | None:
        found = await next_lease_end()
        monkeypatch.undo()
        rescue.note_dead({"dead:1": HERE})
        return found

    monkeypatch.setattr(rescue, "_next_lease_end", next_lease_end_during_a_death)
    task = asyncio.create_task(rescue.run(), name="rescue")
    await await_for(was_sent(sent, "r1"), "its run was woken")
    await end_task(task)


async def test_a_death_is_handled_after_redis_is_reachable_again(
    store: AsyncStore, queues: Queues, sent: list[Wake], hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis is unreachable at that moment: the report is kept."""
    register_worker(hand, "dead:1", "r1")
    rescue, refuses = new_rescue(store, queues, sent), True
    run = store.run

    async def run_or_refuse(call: Any) -> Any:
        if refuses and call.script.name == "end_lease":
            raise RedisUnreachable("unreachable")
        return await run(call)

    monkeypatch.setattr(store, "run", run_or_refuse)
    rescue.note_dead({"dead:1": HERE})
    with pytest.raises(RedisUnreachable):
        await rescue._one_pass()
    refuses = False
    await rescue._one_pass()

    assert was_sent(sent, "r1")()


async def test_a_worker_that_is_alive_keeps_its_runs(running: Rescue, hand: Hand, sent: list[Wake]) -> None:
    """Runs are reclaimed only after the end of their worker's lease."""
    hand.submit("mine", "s9")
    hand.claim("mine")

    register_dying_worker(hand, "r1")
    await await_for(was_sent(sent, "r1"), "the other worker's run was woken")

    assert hand.store.ask(lambda r: r.hget(hand.store.keys("run", "mine"), "state")) == "running"


async def test_more_runs_than_a_call_takes_are_all_woken(
    store: AsyncStore, queues: Queues, hand: Hand, sent: list[Wake]
) -> None:
    """The runs of a worker are reclaimed in script calls of one hundred."""
    # With a short grace, a slow machine would send the first hundred again before the last one is reclaimed.
    rescue = new_rescue(store, queues, sent, grace_s=600)
    run_ids = [f"r{number}" for number in range(250)]
    await asyncio.to_thread(register_dying_worker, hand, *run_ids)
    await rescue.reclaim_all()  # not `once`: on a slow machine it sends wake-ups again that are not new

    assert was_sent(sent, *run_ids)()


async def test_a_retry_is_woken_when_it_is_due_and_not_before(
    running: Rescue, hand: Hand, sent: list[Wake]
) -> None:
    """Its due time is a minimum: a provider's retry-after is respected."""
    hand.submit("r1")
    hand.claim("r1")
    hand.retry("r1", delay_ms=400)
    due_ms = int(hand.store.ask(lambda r: r.hget(hand.store.keys("run", "r1"), "due")))

    await await_for(was_sent(sent, "r1"), "the run was woken")

    assert sent[0].sent_us >= due_ms * 1000, "both by Redis's clock"


async def test_a_lost_message_is_sent_again_once(
    running: Rescue, hand: Hand, queues: Queues, sent: list[Wake]
) -> None:
    """A message that is older than the grace and than all waiting messages must be lost."""
    hand.submit("r1")

    await await_for(was_sent(sent, "r1"), "the run was woken")


async def test_a_message_behind_an_older_one_is_not_sent_again(
    rescue: Rescue, hand: Hand, queues: Queues, sent: list[Wake]
) -> None:
    """In a long queue a message is not lost while an older one still waits."""
    queues.oldest = 1
    hand.submit("r1")
    await await_for(lambda: grace_is_over(hand), "the grace is over")

    assert await rescue.once() == 0

    queues.oldest = EMPTY
    assert await rescue.once() == 1


async def test_where_the_queue_cannot_be_read_messages_are_resent_with_growing_grace(
    rescue: Rescue, hand: Hand, queues: Queues, sent: list[Wake]
) -> None:
    """The grace of a run doubles with each message, so that a long queue is not flooded with duplicates."""
    queues.oldest = None
    hand.submit("r1")
    await await_for(lambda: grace_is_over(hand), "the grace is over")
    assert await rescue.once() == 1

    await await_for(lambda: grace_is_over(hand), "the first grace is over again")

    assert await rescue.once() == 0
    await await_for(partial(_recovers_a_run, rescue), "after twice the grace it is sent again")
    assert was_sent(sent, "r1", "r1")()


async def test_where_the_queue_cannot_be_read_a_new_run_does_not_wait_for_an_old_one(
    rescue: Rescue, hand: Hand, queues: Queues, sent: list[Wake]
) -> None:
    """Each run has its own grace, whatever was re-sent for other runs."""
    queues.oldest = None
    hand.submit("old")
    for times in (1, 2, 3):
        await await_for(partial(_recovers_a_run, rescue), f"it is sent again, {times}")
    hand.submit("new", "s2")

    await await_for(partial(_recovers_a_run, rescue), "one of them is sent again")

    assert [wake.run_id for wake in sent][:4] == ["old", "old", "old", "new"]


async def test_a_run_that_kills_its_workers_is_ended(
    store: AsyncStore, queues: Queues, sent: list[Wake], hand: Hand
) -> None:
    """After `max_recoveries` without a step in between it is poisoned, unless Redis was unreachable."""
    rescue = new_rescue(store, queues, sent, max_recoveries=1)
    hand.submit("r1", "s0")
    for after, ago_ms in (
        ("queued", 60_000),
        ("failed", 0),
    ):  # not at once: that would count as an outage of Redis
        own, hand.incarnation = hand.incarnation, f"dead:{after}"
        hand.store.run(scripts.register(incarnation=hand.incarnation, lease_ms=60_000, agents=[]))
        hand.claim("r1")
        hand.store.run(scripts.register(incarnation=hand.incarnation, lease_ms=-ago_ms, agents=[]))
        hand.incarnation = own

        await rescue.once()

        assert hand.store.ask(lambda r: r.hget(hand.store.keys("run", "r1"), "state")) == after


async def test_an_idle_cell_costs_few_commands(store: AsyncStore, sent: list[Wake], hand: Hand) -> None:
    """Known deadlines are not polled: about two commands a second remain."""
    queries = 0
    now_s = 0.0

    class Counted(AsyncStore):
        async def ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
            nonlocal queries
            queries += 1
            return await super().ask(question)

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        if now_s > 10:
            raise asyncio.CancelledError

    counted = Counted(store.cell)
    rescue = Rescue(
        counted,
        backlog=Queues(),
        send_wakes=send_nothing,
        queues=["agents"],
        limits=RescueLimits(lease_ms=10_000, heartbeat_ms=2_500, max_recoveries=5),
        clock=RescueClock(clock=lambda: now_s, sleep=sleep),
    )
    with suppress(asyncio.CancelledError):
        await rescue.run()
    await counted.close()

    assert queries < 25


async def _recovers_a_run(rescue: Rescue) -> bool:
    return await rescue.once() > 0


async def send_nothing(wakes: Sequence[Wake]) -> None:
    assert not wakes, "no wake-up was expected"


def grace_is_over(hand: Hand) -> bool:
    """Whether the oldest wake-up was sent longer ago than the grace of these tests, by Redis's clock."""
    seconds, micros = hand.store.ask(lambda r: r.time())
    first = hand.store.ask(lambda r: r.zrange(hand.store.keys("sent", "agents"), 0, 0, withscores=True))
    return bool(seconds * 1_000_000 + micros - first[0][1] > 200_000)


async def test_expired_entries_are_removed_from_the_indexes(
    redis_url: str, sent: list[Wake], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker does it periodically; no separate process is needed."""
    monkeypatch.setattr("openagents_worker.worker.rescue.PRUNE_PERIOD_S", 0.2)
    store = AsyncStore(Cell(redis_url, run_ttl_ms=100, session_ttl_ms=100))
    with Hand(redis_url, run_ttl_ms=100, session_ttl_ms=100) as hand:
        hand.end("r1", steps=1)
        assert hand.store.redis.exists(hand.store.keys("index", "all"))
        task = asyncio.create_task(new_rescue(store, Queues(), sent).run())
        await await_for(lambda: not hand.store.redis.keys("oa:index*"), "no index is left")
        await end_task(task)
    await store.close()
