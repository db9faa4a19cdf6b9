"""The rescue. The only place that brings back runs of dead workers, runs that are due, and lost messages.
It also takes runs and sessions that have expired out of the lists.

Every worker does it, and the scripts see to it that each run is brought back once. Nothing is polled that
says when it will be due: between two looks at a lease or at a queue lies the time that they themselves give.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar

from openagents_worker.errors import RedisRefused, RedisUnreachable, RedisWrongType
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.dead_letters import parse_entries, put_key_aside
from openagents_worker.store.listing import prune_indexes
from openagents_worker.store.scripts import (
    Wake,
    aside_news,
    end_lease,
    reclaim,
    resend,
    resend_unread,
    wake,
)
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.local_processes import ProcessIdentity

__all__ = ["GRACE_S", "OldestMessage", "Rescue"]

log = get_logger(__name__)

LIMIT = 100  # runs a script call: a few milliseconds of Redis
PERIOD_S = 0.75  # how late a run is woken at most whose due time was set just after a look
GRACE_S = 5.0  # a message takes milliseconds; after this long it may be missed
MAX_GRACE_S = 600.0  # where nobody can say whether a message still waits
LOOK_AGAIN_S = 1.0  # at a queue whose messages are old but still there
JITTER_S = 0.1  # workers that wait for the same deadline do not all come at once
SHORTEST_PAUSE_S = 0.01
PRUNE_PERIOD_S = 60.0
SAY_PERIOD_S = 10.0  # of what was put aside
MOST_SAID = 100

T = TypeVar("T")


class OldestMessage(Protocol):
    """Says when a queue's oldest message was sent, in µs; None: nobody knows."""

    async def oldest_us(self, queue: str) -> int | None: ...


@dataclass
class _Queue:
    name: str
    look_at_s: float = 0.0


class Rescue:
    """Looks after the runs of a cell, as an asyncio task: `await Rescue(...).run()`."""

    def __init__(
        self,
        *,
        store: AsyncStore,
        backlog: OldestMessage,
        send_wakes: Callable[[Sequence[Wake]], Awaitable[None]],
        queues: Sequence[str],
        lease_ms: int,
        heartbeat_ms: int,
        max_recoveries: int,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        self._store = store
        self._backlog = backlog
        self._send_wakes = send_wakes
        self._queues = [_Queue(name) for name in sorted(set(queues))]
        self._lease_ms = lease_ms
        self._heartbeat_ms = heartbeat_ms
        self._max_recoveries = max_recoveries
        self._grace_s = grace_s
        self._clock = clock
        self._chance = chance
        self._sleep = sleep or self._sleep_until_hurried
        self._hurried = asyncio.Event()
        self._dead: dict[str, ProcessIdentity] = {}
        self._server_ahead_ms = 0.0  # Redis's clock minus ours
        self._look_at_workers_s = 0.0
        self._say_at_s = 0.0
        self._failed = False
        self._prune_at_s = clock() + PRUNE_PERIOD_S * chance()
        self._redis_run_id = ""
        self._redis_changed_s = float("-inf")

    async def run(self) -> NoReturn:
        """For ever; survives whatever happens to Redis."""
        away = False
        while True:
            pause_s = PERIOD_S * (0.75 + 0.5 * self._chance())
            try:
                pause_s = min(pause_s, await self._pass())
                away = False
            except RedisUnreachable as error:
                if not away:
                    log.warning("rescue.redis_away", error=error.message)
                away, self._look_at_workers_s = True, 0.0
            except Exception:  # the loop that saves others must not die of one bad answer
                log.exception("rescue.failed")
            await self._sleep(max(pause_s, SHORTEST_PAUSE_S))

    def hurry(self) -> None:
        """A lease was ended before its time: look at the leases now. Called on the loop."""
        self._hurried.set()

    def note_dead(self, dead: Mapping[str, ProcessIdentity]) -> None:
        """These incarnations' processes are dead for certain: end their leases. Called on the loop."""
        self._dead |= dead
        self.hurry()

    async def once(self) -> int:
        """Do now whatever is to be done; returns how many runs were brought back."""
        brought_back = await self.reclaim_all() + await self._wake_all()
        for queue in self._queues:
            brought_back += await self._resend(queue.name)
        return brought_back

    async def reclaim_all(self) -> int:
        """Take the runs of all workers whose lease is over."""
        blameless = self._clock() - self._redis_changed_s < 2 * self._lease_ms / 1000
        door = reclaim(
            limit=LIMIT,
            max_recoveries=self._max_recoveries,
            blameless=blameless,
            heartbeat_ms=self._heartbeat_ms,
        )
        brought_back = 0
        while (answer := await self._store.run(door)).incarnation:
            log.warning(
                "worker.gone", incarnation=answer.incarnation, runs=len(answer.wakes), left=answer.left
            )
            brought_back += await self._sent(answer.wakes)
        return brought_back

    async def prune(self) -> int:
        """Take out of the lists what has expired; returns how many entries that were."""
        return await self._store.execute(prune_indexes())

    # --- one pass ---

    async def _pass(self) -> float:
        """Do what is due; returns the seconds until something else will be."""
        if self._hurried.is_set():
            self._hurried.clear()
            self._look_at_workers_s = 0.0
        self._failed = False
        await self._part("end leases", self._end_leases)
        if self._clock() >= self._look_at_workers_s:
            await self._part("look at workers", self._look_at_workers)
        due_in_s = await self._part("look at due runs", self._look_at_due)
        for queue in self._queues:
            if self._clock() >= queue.look_at_s:
                await self._part("look at a queue", partial(self._look_at_queue, queue))
        if self._clock() >= self._prune_at_s:
            self._prune_at_s = self._clock() + PRUNE_PERIOD_S * (0.75 + 0.5 * self._chance())
            await self._part("prune", self.prune)
        if self._clock() >= self._say_at_s:
            self._say_at_s = self._clock() + SAY_PERIOD_S
            await self._part("say what was put aside", self._say_what_was_put_aside)
        due_in_s = PERIOD_S if due_in_s is None else due_in_s
        marks = [self._look_at_workers_s, *(queue.look_at_s for queue in self._queues)]
        pause_s = min(due_in_s, min(marks) - self._clock())
        return max(pause_s, PERIOD_S) if self._failed else pause_s

    async def _part(self, name: str, work: Callable[[], Awaitable[T]]) -> T | None:
        """One part of a pass. What Redis refuses of it, or what is wrong with what it reads, stops no other;
        a Redis that is away stops them all. None when it has failed."""
        try:
            return await work()
        except RedisWrongType as error:
            moved = await self._store.execute(put_key_aside(self._store.keys, error.key))
            log.error("key.wrong_type", key=error.key, part=name, put_aside=moved, hint=error.hint)
            if moved:
                return await work()
        except RedisRefused as error:
            log.error("rescue.refused", part=name, error=error.message, hint=error.hint)
        except RedisUnreachable:
            raise
        except Exception:  # the loop that saves others must not die of one bad answer
            log.exception("rescue.failed", part=name)
        self._failed = True  # so that it is not tried again at once
        return None

    async def _say_what_was_put_aside(self) -> None:
        """One line for each, by one of the workers. Items of queues were logged by whoever took them."""
        news: tuple[str, ...] = await self._store.run(aside_news(limit=MOST_SAID))
        for entry in parse_entries(news):
            if not entry.item:
                log.error(
                    "put_aside", key=entry.key, code=entry.code, what=entry.what, moved_to=entry.moved_to
                )

    async def _end_leases(self) -> None:
        """End the leases of dead processes; one that could not be ended now is ended at the next pass."""
        for incarnation, process in list(self._dead.items()):
            call = end_lease(incarnation=incarnation, host=process.host, process=process.process)
            if await self._store.run(call) == "OK":
                log.warning("worker.process_dead", incarnation=incarnation, process=process.process)
            del self._dead[incarnation]

    async def _look_at_workers(self) -> None:
        over_in_s = await self._next_lease_end()
        if over_in_s is not None and over_in_s <= 0:
            await self.reclaim_all()
            over_in_s = await self._next_lease_end()
        # A worker that registers meanwhile has a lease of its own ahead of it.
        ahead_s = self._lease_ms / 1000 if over_in_s is None else min(over_in_s, self._lease_ms / 1000)
        self._look_at_workers_s = self._clock() + max(ahead_s, 0) + JITTER_S * self._chance()

    async def _next_lease_end(self) -> float | None:
        """Seconds until the first lease ends, negative once it is over; None without workers."""
        pipe: Any
        async with self._store.redis.pipeline(transaction=False) as pipe:
            pipe.time().info("server").zrange(self._store.keys("workers"), 0, 0, withscores=True)
            (seconds, micros), server, first = await self._store.ask(lambda _: pipe.execute())
        self._server_ahead_ms = seconds * 1000 + micros / 1000 - self._clock() * 1000
        self._note_restart(server)
        return self._in_s(first[0][1]) if first else None

    def _note_restart(self, server: dict[str, Any]) -> None:
        """Runs whose workers lost their leases because Redis was away are not to blame for it."""
        run_id = str(server.get("run_id", ""))
        young = float(server.get("uptime_in_seconds", "inf")) * 1000 < 2 * self._lease_ms
        if run_id != self._redis_run_id and (self._redis_run_id or young):
            self._redis_changed_s = self._clock()
        self._redis_run_id = run_id

    async def _look_at_due(self) -> float:
        key = self._store.keys("due")
        first = await self._first(key)
        if first is not None and self._in_s(first) <= 0:
            await self._wake_all()
            first = await self._first(key)
        return PERIOD_S if first is None else max(self._in_s(first), 0)

    async def _wake_all(self) -> int:
        brought_back, seen = 0, LIMIT
        while seen == LIMIT:
            wakes, seen = await self._store.run(wake(limit=LIMIT))
            brought_back += await self._sent(wakes)
        return brought_back

    async def _look_at_queue(self, queue: _Queue) -> None:
        sent_us = await self._first(self._store.keys("sent", queue.name))
        patient_s = self._grace_s if sent_us is None else self._grace_s + self._in_s(sent_us / 1000)
        if patient_s <= 0:
            await self._resend(queue.name)
            patient_s = LOOK_AGAIN_S
        queue.look_at_s = self._clock() + patient_s

    async def _resend(self, queue: str) -> int:
        """Send again what can no longer be in the queue; where nobody can look, each run ever less often."""
        oldest_us = await self._backlog.oldest_us(queue)
        grace_ms = int(self._grace_s * 1000)
        if oldest_us is None:
            brought_back = await self._resend_unread(queue, grace_ms)
        else:
            brought_back = await self._resend_lost(queue, grace_ms, oldest_us)
        if brought_back:
            log.info("runs.sent_again", queue=queue, runs=brought_back, readable=oldest_us is not None)
        return brought_back

    async def _resend_lost(self, queue: str, grace_ms: int, oldest_us: int) -> int:
        door = resend(queue=queue, oldest_us=oldest_us, grace_ms=grace_ms, limit=LIMIT)
        brought_back, sent = 0, LIMIT
        while sent == LIMIT:
            wakes = await self._store.run(door)
            sent = await self._sent(wakes)
            brought_back += sent
        return brought_back

    async def _resend_unread(self, queue: str, grace_ms: int) -> int:
        max_grace_ms = int(MAX_GRACE_S * 1000)
        door = resend_unread(queue=queue, grace_ms=grace_ms, max_grace_ms=max_grace_ms, limit=LIMIT)
        brought_back, seen = 0, LIMIT
        while seen >= LIMIT:
            wakes, seen = await self._store.run(door)
            brought_back += await self._sent(wakes)
        return brought_back

    async def _sent(self, wakes: Sequence[Wake]) -> int:
        if wakes:
            await self._send_wakes(wakes)
        return len(wakes)

    async def _sleep_until_hurried(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurried.wait()

    async def _first(self, key: str) -> float | None:
        """The lowest score of a sorted set."""
        first: list[tuple[str, float]] = await self._store.ask(lambda r: r.zrange(key, 0, 0, withscores=True))
        return float(first[0][1]) if first else None

    def _in_s(self, server_ms: float) -> float:
        """A time of Redis's clock as seconds from now."""
        return (server_ms - self._server_ahead_ms) / 1000 - self._clock()
