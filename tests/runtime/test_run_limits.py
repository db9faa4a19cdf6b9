"""How a call waits for its request, with a clock of the test; Redis and the scripts are real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from openagents_worker.errors import LLMRateLimitError
from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.llm.limits import LimitWait, RequestLimit
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.latch import Latch, RunLatched
from openagents_worker.runtime.limits import RunLimits
from openagents_worker.runtime.services import Services
from openagents_worker.store import scripts
from openagents_worker.store.scripts import Wake
from tests.support.runner import Process, process

ONE_AT_ONCE = RequestLimit("k", max_concurrency=1)
SIXTY = RequestLimit("k", requests_per_minute=60)


class Time:
    """A clock that only sleeping moves, and `stall` seconds that each sleep takes too long."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.stalls: list[float] = []
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds + (self.stalls.pop(0) if self.stalls else 0.0)
        await asyncio.sleep(0)


async def send_nothing(_: Sequence[Wake]) -> None:
    pass


@asynccontextmanager
async def limits_of(
    p: Process, run_id: str, time: Time, *, durable: bool = True, fence: str = ""
) -> AsyncIterator[RunLimits]:
    """The limits of an attempt that has claimed the run, inside a model call of it."""
    await p.submit(run_id, session_id=run_id)
    claim = scripts.claim(run_id=run_id, incarnation=p.lease.incarnation, nonce="n", page_bytes=1000)
    fence = fence or (await p.store.run(claim)).fence
    identity = RunIdentity(run_id, run_id, "a", "u", fence, 1, 1, p.lease.incarnation)
    latch: Any = Latch()
    store = FencedStore(identity, p.store, lease=p.lease, latch=latch)
    services: Services = p.runner._services
    limits = RunLimits(identity, "t", services, store=store, sleep=time.sleep, clock=time.clock)
    token = current_call.set(CallInfo(run_id, "c", "k", 0, kind="model", may_suspend=durable))
    try:
        yield limits
    finally:
        current_call.reset(token)
        await limits.close()
        await p.store.run(scripts.cancel(run_id=run_id, reason="the test is over", force=True))


async def in_use(p: Process) -> int:
    count: int = await p.store.redis.zcard(p.store.keys("limit_calls", "k"))
    return count


async def test_a_call_asks_again_for_a_second_before_its_run_is_parked(redis_url: str) -> None:
    """All concurrent requests are in use, and nobody says for how long."""
    time = Time()
    async with process(redis_url) as p, limits_of(p, "r1", time) as first:
        await first.reserve(ONE_AT_ONCE, 0)
        async with limits_of(p, "r2", time) as second:
            with pytest.raises(LimitWait) as wait:
                await second.reserve(ONE_AT_ONCE, 0)

    assert 1.0 <= sum(time.slept) < 1.2
    assert (wait.value.name, wait.value.tenant) == ("k", "t")


async def test_a_run_that_cannot_be_parked_waits_for_a_minute(redis_url: str) -> None:
    time = Time()
    async with process(redis_url) as p, limits_of(p, "r1", time) as first:
        await first.reserve(ONE_AT_ONCE, 0)
        async with limits_of(p, "r2", time, durable=False) as second:
            with pytest.raises(LLMRateLimitError, match="had no room for 60 s") as error:
                await second.reserve(ONE_AT_ONCE, 0)

    assert error.value.retryable
    assert 60 <= sum(time.slept) < 60.2


async def test_a_request_that_is_late_is_reserved_again(redis_url: str) -> None:
    """The process was busy for half a second. The time of the first reservation is lost."""
    time = Time()
    time.stalls = [0.5]
    async with process(redis_url) as p, limits_of(p, "r1", time) as limits:
        await limits.reserve(SIXTY, 0)
        reserved = await in_use(p)

    assert len(time.slept) == 2
    assert reserved == 1


async def test_a_request_that_is_always_late_is_sent(redis_url: str) -> None:
    time = Time()
    time.stalls = [0.5] * 9
    async with process(redis_url) as p, limits_of(p, "r1", time) as limits:
        await limits.reserve(SIXTY, 0)

    assert len(time.slept) == 2


async def test_a_worker_that_has_lost_its_run_sends_nothing(redis_url: str) -> None:
    async with process(redis_url) as p, limits_of(p, "r1", Time(), fence="9:other") as limits:
        with pytest.raises(RunLatched):
            await limits.reserve(SIXTY, 0)
        assert await in_use(p) == 0


async def test_a_call_that_is_cancelled_while_it_asks_reserves_nothing(redis_url: str) -> None:
    """The script may have reserved the request before its answer could arrive."""
    async with process(redis_url) as p, limits_of(p, "r1", Time()) as limits:
        asking = asyncio.create_task(limits.reserve(ONE_AT_ONCE, 0))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await limits.close()
        assert await in_use(p) == 0
