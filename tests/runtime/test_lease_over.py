"""When the lease is over, waiting writes are abandoned and no call begins."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunState
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.runner import AttemptOutcome
from tests.runtime import plugins
from tests.runtime.test_replay import executed_until, open_gates, patterned, tool
from tests.support.runner import process
from tests.support.waiting import await_for


@contextmanager
def silent(redis: EmbeddedRedis) -> Generator[None]:
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(redis.pid, signal.SIGCONT)


def begun() -> bool:
    return any(entry[0] == "begin" for entry in plugins.LOG)


async def test_a_write_that_waits_for_redis_is_abandoned_when_the_lease_is_over() -> None:
    """The attempt ends although Redis does not reply, whatever the time-out of its connection."""
    redis = await asyncio.to_thread(EmbeddedRedis().__enter__)
    try:
        async with process(redis.url, patterned("Steps", tool("Charge"), n=2)) as p:
            p.store._batcher._answer_timeout_s = float("inf")
            await p.submit()
            executing = await executed_until(p, begun, "a call is being made")
            with silent(redis):
                open_gates("charge-0", "charge-1")
                await await_for(lambda: p.store._batcher._pipelines[0].task is not None, "it commits")

                await p.runner.latch_all(LatchReason.FENCED)

                assert (await executing).kind is AttemptOutcome.SKIPPED
    finally:
        await asyncio.to_thread(redis.__exit__, None, None, None)


async def test_no_call_begins_when_the_lease_is_over(redis_url: str) -> None:
    """Another worker may own the run before the call would end."""
    async with process(redis_url, patterned("Steps", tool("Charge"), n=2)) as p:
        await p.submit()
        executing = await executed_until(p, begun, "the first call is being made")
        p.lease.left_s = 0.0
        open_gates("charge-0", "charge-1")

        attempt_result = await asyncio.wait_for(executing, 60)

        assert (attempt_result.kind, attempt_result.reason) == (AttemptOutcome.SKIPPED, "fenced")
        assert len(plugins.executed("charge")) == 1
        assert len(await p.journal()) == 2, "what was made is stored all the same"


async def test_a_run_claimed_at_the_end_of_the_lease_is_released(redis_url: str) -> None:
    """It is not executed here. A wake-up goes to other workers."""
    async with process(redis_url) as p:
        await p.submit()
        original = p.store.run_until

        async def until_it_is_claimed(call: Any, until: Any) -> Any:
            answer = await original(call, until)
            p.lease.left_s = 0.0
            return answer

        p.store.run_until = until_it_is_claimed  # type: ignore[method-assign]

        attempt_result = await p.execute()

        assert (attempt_result.kind, attempt_result.reason) == (AttemptOutcome.SKIPPED, "handover")
        assert (await p.record()).state is RunState.QUEUED
        assert [wake.run_id for wake in p.wakes] == ["r1"]
