"""The rescue loop: the only place that reclaims runs of dead workers, wakes due runs, re-sends messages.

It also removes expired runs and sessions from the indexes. Every worker runs it; the scripts guarantee that
each run is reclaimed once. It sleeps until the earliest known deadline (next lease expiry, due run or
overdue message) instead of polling at a fixed rate.
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
    first_due,
    limit_serve,
    reclaim,
    resend,
    resend_unread,
    wake,
)
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.signals import count, observe
from openagents_worker.worker.background import LATE_AFTER_S, Health
from openagents_worker.worker.interruptions import end_overdue
from openagents_worker.worker.local_processes import ProcessIdentity

__all__ = ["GRACE_S", "OldestMessage", "Rescue", "RescueClock", "RescueLimits"]

log = get_logger(__name__)

LIMIT = 100  # runs per script call, which then takes a few milliseconds in Redis
LIMITS = 10  # limits of the fleet per script call
PERIOD_S = 0.75  # the longest delay of a run whose due time was set just after a check
GRACE_S = 5.0  # a message arrives in milliseconds; after this time it may be lost
MAX_GRACE_S = 600.0  # the longest grace where the broker's queue cannot be read
CHECK_AGAIN_S = 1.0  # for a queue whose messages are old but still in it
JITTER_S = 0.1  # spreads workers that wait for the same deadline
SHORTEST_PAUSE_S = 0.01
PRUNE_PERIOD_S = 60.0
DEAD_LETTER_LOG_PERIOD_S = 10.0
MAX_LOGGED_DEAD_LETTERS = 100

T = TypeVar("T")


class OldestMessage(Protocol):
    """Returns when the oldest message of a queue was sent, in µs; None if that is unknown."""

    async def oldest_us(self, queue: str) -> int | None: ...


@dataclass
class _Queue:
    name: str
    check_at_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RescueLimits:
    """The lease and the heartbeat of the workers, and when a run is given up or its message is lost."""

    lease_ms: int
    heartbeat_ms: int
    max_recoveries: int
    grace_s: float = GRACE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class RescueClock:
    """The time and the chance of a rescue loop. Without `sleep` it waits until `check_leases_now`."""

    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random
    sleep: Callable[[float], Awaitable[None]] | None = None


class Rescue:
    """Recovers the runs of one cell, as an asyncio task: `await Rescue(...).run()`."""

    def __init__(
        self,
        store: AsyncStore,
        *,
        backlog: OldestMessage,
        send_wakes: Callable[[Sequence[Wake]], Awaitable[None]],
        queues: Sequence[str],
        limits: RescueLimits,
        clock: RescueClock = RescueClock(),
    ) -> None:
        self._store = store
        self._backlog = backlog
        self._send_wakes = send_wakes
        self._queues = [_Queue(name) for name in sorted(set(queues))]
        self._limits = limits
        self._lease_ms = limits.lease_ms
        self._grace_s = limits.grace_s
        self._clock = clock.clock
        self._chance = clock.chance
        self._sleep = clock.sleep or self._sleep_until_interrupted
        self._interrupt = asyncio.Event()
        self._dead: dict[str, ProcessIdentity] = {}
        self._redis_ahead_ms = 0.0  # the clock of Redis minus the local clock
        self._check_leases_at_s = 0.0
        self._log_dead_letters_at_s = 0.0
        self._first_limit_ms: float | None = None
        self._failed = False
        self._prune_at_s = self._clock() + PRUNE_PERIOD_S * self._chance()
        self._redis_run_id = ""
        self._redis_changed_s = float("-inf")
        self.health = Health(late_after_s=LATE_AFTER_S)

    async def run(self) -> NoReturn:
        """Run passes until cancelled. No error of Redis ends it."""
        is_redis_away = False
        while True:
            pause_s = PERIOD_S * (0.75 + 0.5 * self._chance())
            try:
                pause_s = min(pause_s, await self._one_pass())
                is_redis_away = False
                if not self._failed:
                    self.health.succeeded()
            except RedisUnreachable as error:
                self.health.failed(error)
                if not is_redis_away:
                    log.warning("rescue.redis_away", error=error.message)
                is_redis_away, self._check_leases_at_s = True, 0.0
            except Exception as error:  # one invalid reply must not end the rescue loop
                self.health.failed(error)
                log.exception("rescue.failed")
            await self._sleep(max(pause_s, SHORTEST_PAUSE_S))

    def check_leases_now(self) -> None:
        """Check the leases now, because one was ended before its expiry. Called on the loop."""
        self._interrupt.set()

    def note_dead(self, dead: Mapping[str, ProcessIdentity]) -> None:
        """End the leases of these incarnations, whose processes are certainly dead. Called on the loop."""
        self._dead |= dead
        self.check_leases_now()

    async def once(self) -> int:
        """Recover every recoverable run now; returns the number of recovered runs."""
        recovered = await self.reclaim_all() + await self._wake_all()
        for queue in self._queues:
            recovered += await self._resend(queue.name)
        return recovered

    async def reclaim_all(self) -> int:
        """Reclaim the runs of all workers whose lease is over; returns the number of runs."""
        blameless = self._clock() - self._redis_changed_s < 2 * self._lease_ms / 1000
        script_call = reclaim(
            limit=LIMIT,
            max_recoveries=self._limits.max_recoveries,
            blameless=blameless,
            heartbeat_ms=self._limits.heartbeat_ms,
        )
        recovered = 0
        while (answer := await self._store.run(script_call)).incarnation:
            log.warning(
                "worker.gone", incarnation=answer.incarnation, runs=len(answer.wakes), left=answer.left
            )
            count("openagents.workers.lost", 0 if answer.left else 1)
            for _ in answer.wakes:
                observe("openagents.recovery.delay", max(answer.age_ms, 0) / 1000)
            recovered += await self._send(answer.wakes)
        return recovered

    async def prune(self) -> int:
        """Remove expired entries from the indexes; returns the number of entries."""
        return await self._store.execute(prune_indexes())

    # --- one pass ---

    async def _one_pass(self) -> float:
        """Execute the parts that are due; returns the seconds until the next part is due."""
        if self._interrupt.is_set():
            self._interrupt.clear()
            self._check_leases_at_s = 0.0
        self._failed = False
        await self._run_part("end leases", self._end_leases)
        if self._clock() >= self._check_leases_at_s:
            await self._run_part("check leases", self._check_leases)
        due_in_s = await self._run_part("check due runs", self._check_due_runs)
        await self._run_part("check limits", self._check_limits)
        for queue in self._queues:
            if self._clock() >= queue.check_at_s:
                await self._run_part("check queue", partial(self._check_queue, queue))
        if self._clock() >= self._prune_at_s:
            self._prune_at_s = self._clock() + PRUNE_PERIOD_S * (0.75 + 0.5 * self._chance())
            await self._run_part("prune", self.prune)
        if self._clock() >= self._log_dead_letters_at_s:
            self._log_dead_letters_at_s = self._clock() + DEAD_LETTER_LOG_PERIOD_S
            await self._run_part("log dead letters", self._log_dead_letters)
        due_in_s = PERIOD_S if due_in_s is None else due_in_s
        check_times_s = [self._check_leases_at_s, *(queue.check_at_s for queue in self._queues)]
        pause_s = min(due_in_s, min(check_times_s) - self._clock())
        return max(pause_s, PERIOD_S) if self._failed else pause_s

    async def _run_part(self, name: str, work: Callable[[], Awaitable[T]]) -> T | None:
        """Execute one part of a pass; returns None if it has failed.

        A refused command or an invalid record fails this part only. An unreachable Redis ends the pass.
        Raises `RedisUnreachable`.
        """
        try:
            return await work()
        except RedisWrongType as error:
            moved = await self._store.execute(put_key_aside(self._store.keys, error.key))
            log.error("key.wrong_type", key=error.key, part=name, put_aside=moved, hint=error.hint)
            if moved:
                return await work()
        except RedisRefused as error:
            self.health.failed(error)
            log.error("rescue.refused", part=name, error=error.message, hint=error.hint)
        except RedisUnreachable:
            raise
        except Exception as error:  # one invalid reply must not end the rescue loop
            self.health.failed(error)
            log.exception("rescue.failed", part=name)
        self._failed = True  # so that the next pass does not begin at once
        return None

    async def _log_dead_letters(self) -> None:
        """Log new dead letters; the script gives each one to one worker. Queue items are logged on
        receipt."""
        entries: tuple[str, ...] = await self._store.run(aside_news(limit=MAX_LOGGED_DEAD_LETTERS))
        for entry in parse_entries(entries):
            if not entry.item:
                log.error(
                    "put_aside", key=entry.key, code=entry.code, what=entry.what, moved_to=entry.moved_to
                )

    async def _end_leases(self) -> None:
        """End the leases of dead processes. A lease that could not be ended is ended in the next pass."""
        for incarnation, process in list(self._dead.items()):
            call = end_lease(incarnation=incarnation, host=process.host, process=process.process)
            if await self._store.run(call) == "OK":
                log.warning("worker.process_dead", incarnation=incarnation, process=process.process)
            del self._dead[incarnation]

    async def _check_leases(self) -> None:
        """Reclaim the runs of expired leases and plan the next check."""
        over_in_s = await self._next_lease_end()
        if over_in_s is not None and over_in_s <= 0:
            await self.reclaim_all()
            over_in_s = await self._next_lease_end()
        # A worker that registers meanwhile has a full lease ahead.
        pause_s = self._lease_ms / 1000 if over_in_s is None else min(over_in_s, self._lease_ms / 1000)
        self._check_leases_at_s = self._clock() + max(pause_s, 0) + JITTER_S * self._chance()

    async def _next_lease_end(self) -> float | None:
        """Seconds until the first lease expires, negative if it has expired; None without workers."""
        workers = self._store.keys("workers")
        (seconds, micros), server, first = await self._store.ask(lambda client: _read_leases(client, workers))
        self._redis_ahead_ms = seconds * 1000 + micros / 1000 - self._clock() * 1000
        self._detect_redis_restart(server)
        return self._seconds_until(first[0][1]) if first else None

    def _detect_redis_restart(self, server: dict[str, Any]) -> None:
        """Detect a restart of Redis: a run is not a suspect if its worker lost its lease because of it.

        `server` is empty if the user may not run INFO: then no restart is detected."""
        run_id = str(server.get("run_id", ""))
        young = float(server.get("uptime_in_seconds", "inf")) * 1000 < 2 * self._lease_ms
        if run_id != self._redis_run_id and (self._redis_run_id or young):
            self._redis_changed_s = self._clock()
        self._redis_run_id = run_id

    async def _check_due_runs(self) -> float:
        """Wake due runs; returns the seconds until the next run is due."""
        first = await self._first_due_ms()
        if first is not None and self._seconds_until(first) <= 0:
            await self._wake_all()
            first = await self._first_due_ms()
        return PERIOD_S if first is None else max(self._seconds_until(first), 0)

    async def _check_limits(self) -> None:
        """Call runs that wait for limits of the fleet, unless model calls have called them meanwhile."""
        first, seen = self._first_limit_ms, LIMITS
        if first is None or self._seconds_until(first) > 0:
            return
        self._first_limit_ms = None
        while seen == LIMITS:
            wakes, seen = await self._store.run(limit_serve(most=LIMITS))
            await self._send(wakes)

    async def _first_due_ms(self) -> float | None:
        """When the first run is due, or the first wait of a parked run is over; None if there is none.

        Also finds out when the first limit of the fleet is checked."""
        found = await self._store.run(first_due())
        self._first_limit_ms = None if found.limit_ms is None else float(found.limit_ms)
        return None if found.run_ms is None else float(found.run_ms)

    async def _wake_all(self) -> int:
        """Wake all due runs; returns their number."""
        recovered, seen = 0, LIMIT
        while seen == LIMIT:
            wakes, seen, overdue = await self._store.run(wake(limit=LIMIT))
            recovered += await self._send(wakes)
            for run_id in overdue:
                recovered += await self._send(await end_overdue(self._store, run_id))
        return recovered

    async def _check_queue(self, queue: _Queue) -> None:
        """Re-send lost messages of a queue and plan the next check."""
        sent_us = await self._lowest_score(self._store.keys("sent", queue.name))
        due_in_s = self._grace_s if sent_us is None else self._grace_s + self._seconds_until(sent_us / 1000)
        if due_in_s <= 0:
            await self._resend(queue.name)
            due_in_s = CHECK_AGAIN_S
        queue.check_at_s = self._clock() + due_in_s

    async def _resend(self, queue: str) -> int:
        """Re-send messages that are no longer in the queue.

        Where the queue cannot be read, each run is re-sent with a grace that doubles up to `MAX_GRACE_S`.
        """
        oldest_us = await self._backlog.oldest_us(queue)
        grace_ms = int(self._grace_s * 1000)
        if oldest_us is None:
            recovered = await self._resend_unread(queue, grace_ms)
        else:
            recovered = await self._resend_lost(queue, grace_ms, oldest_us)
        if recovered:
            log.info("runs.sent_again", queue=queue, runs=recovered, readable=oldest_us is not None)
        return recovered

    async def _resend_lost(self, queue: str, grace_ms: int, oldest_us: int) -> int:
        """Re-send messages that are older than the oldest message in the queue."""
        script_call = resend(queue=queue, oldest_us=oldest_us, grace_ms=grace_ms, limit=LIMIT)
        recovered, sent = 0, LIMIT
        while sent == LIMIT:
            wakes = await self._store.run(script_call)
            sent = await self._send(wakes)
            recovered += sent
        return recovered

    async def _resend_unread(self, queue: str, grace_ms: int) -> int:
        """Re-send messages whose grace has ended, for a queue that cannot be read."""
        max_grace_ms = int(MAX_GRACE_S * 1000)
        script_call = resend_unread(queue=queue, grace_ms=grace_ms, max_grace_ms=max_grace_ms, limit=LIMIT)
        recovered, seen = 0, LIMIT
        while seen >= LIMIT:
            wakes, seen = await self._store.run(script_call)
            recovered += await self._send(wakes)
        return recovered

    async def _send(self, wakes: Sequence[Wake]) -> int:
        if wakes:
            await self._send_wakes(wakes)
        return len(wakes)

    async def _sleep_until_interrupted(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._interrupt.wait()

    async def _lowest_score(self, key: str) -> float | None:
        """The lowest score of a sorted set; None if it is empty."""
        first: list[tuple[str, float]] = await self._store.ask(lambda r: r.zrange(key, 0, 0, withscores=True))
        return float(first[0][1]) if first else None

    def _seconds_until(self, server_ms: float) -> float:
        """Seconds from now until a time of Redis's clock in milliseconds."""
        return (server_ms - self._redis_ahead_ms) / 1000 - self._clock()


async def _read_leases(client: Any, workers: str) -> tuple[Any, dict[str, Any], Any]:
    """The time of Redis, INFO, and the lease that expires first. INFO is empty where Redis refuses it."""
    async with client.pipeline(transaction=False) as pipe:
        pipe.time().info("server").zrange(workers, 0, 0, withscores=True)
        time_, server, first = await pipe.execute(raise_on_error=False)
    for answer in (time_, first):
        if isinstance(answer, Exception):
            raise answer
    return time_, server if isinstance(server, dict) else {}, first
