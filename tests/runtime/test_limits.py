"""Limits of the fleet, as a run meets them: it waits inside its call, or it is parked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from openagents_worker.events import RunEvent
from openagents_worker.models import RunState
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.store import scripts
from openagents_worker.worker.run_export import report_of
from tests.runtime.talking import talker
from tests.support.runner import Process, agent, crash, process
from tests.support.waiting import await_for
from tests.unit.llm.raw_server import JSON, Sent, answering, delta, sse

KEY = "scripted:scripted"
ONE_A_MINUTE = {"requests_per_minute": 1}
ANSWER = Sent((sse(delta(content="Done."), delta("stop"), "[DONE]"),))
SLOW = Sent((b"{}",), f"{JSON}\r\nretry-after-ms: 30000", "429 Slow")


def limited(limits: dict[str, Any], **llm: Any) -> dict[str, Any]:
    return agent(llm={"provider": "scripted", "script": [{"text": "hello"}] * 50, "limits": limits, **llm})


@asynccontextmanager
async def two(redis_url: str, definition: dict[str, Any]) -> AsyncIterator[tuple[Process, Process]]:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(process(redis_url, definition, name="w1"))
        yield first, await stack.enter_async_context(process(redis_url, definition, name="w2"))


async def submitted(p: Process, *run_ids: str, **fields: Any) -> None:
    for run_id in run_ids:
        await p.submit(run_id, session_id=run_id, **fields)


async def pass_a_minute(p: Process, name: str = KEY) -> None:
    """As if a minute had passed for the limit, and its queue were due to be checked."""
    key = p.store.keys("limit", name)
    for field, by in (("next_us", 60_000_000), ("blocked_until_ms", 60_000)):
        if (at := await p.store.redis.hget(key, field)) is not None:
            await p.store.redis.hset(key, field, str(int(at) - by))
    await p.store.redis.zadd(p.store.keys("limits"), {name: 1}, xx=True)


async def served(p: Process) -> list[str]:
    return [wake.run_id for wake in (await p.store.run(scripts.limit_serve(most=10))).wakes]


async def test_a_run_over_the_limit_is_parked_and_continues_when_there_is_room(redis_url: str) -> None:
    """It holds no slot and counts no retry; its event says for how long it waits. Workers share the limit."""
    async with two(redis_url, limited(ONE_A_MINUTE)) as (first, second):
        await submitted(first, "r1", "r2")
        completed = await first.execute("r1")
        parked = await second.execute("r2")
        record = await second.record("r2")
        too_early = await second.execute("r2")
        await pass_a_minute(first)
        called = await served(first)
        await second.execute("r2")
        ended = await second.record("r2")
        events = await second.events("r2")

    assert completed.kind is AttemptOutcome.FINISHED
    assert parked.kind is AttemptOutcome.SUSPENDED
    assert parked.reason.startswith(f"waiting for limit {KEY} until")
    assert record.state is RunState.WAITING
    assert [(wait.kind, wait.name) for wait in record.waiting] == [("limit", KEY)]
    assert too_early.kind is AttemptOutcome.SKIPPED
    assert called == ["r2"]
    assert (ended.state, ended.attempt) == (RunState.COMPLETED, 2)
    [waited] = [event["payload"] for event in events if event["name"] == "llm.limited"]
    assert waited["key"] == KEY
    assert 50_000 < waited["delay_ms"] <= 60_000
    names = [event["name"] for event in events]
    assert {"run.waiting", "run.woken"} <= set(names)
    assert not {"run.retry_scheduled", "llm.failed"} & set(names)
    assert names.count("llm.called") == 2
    report = report_of(ended, [RunEvent.model_validate(event) for event in events])
    assert [each.metrics.attempt for each in report.calls if each.metrics] == [1], "one request was sent"


async def test_a_replayed_call_takes_nothing(redis_url: str) -> None:
    """The first call of the run is in the journal; only its second call waits."""
    script = [{"tool_calls": [{"name": "calc", "arguments": {"expression": "1+1"}}]}, {"text": "two"}]
    definition = limited(ONE_A_MINUTE, script=script) | {"tools": [{"id": "calc", "type": "calc"}]}
    async with process(redis_url, definition) as p:
        await submitted(p, "r1")
        await p.execute("r1")
        await pass_a_minute(p)
        called = await served(p)
        await p.execute("r1")
        names = await p.event_names("r1")
        next_us = int(await p.store.redis.hget(p.store.keys("limit", KEY), "next_us"))
        seconds, _ = await p.store.redis.time()

    assert called == ["r1"]
    assert names.count("llm.succeeded") == 2
    assert names[-1] == "session.run.completed"
    assert next_us / 1e6 - seconds < 61, "the second attempt has reserved one request"


async def test_a_request_that_has_ended_gives_its_share_back(redis_url: str) -> None:
    async with process(redis_url, limited({"max_concurrency": 1})) as p:
        await submitted(p, "r1", "r2")
        outcomes = [(await p.execute(run_id)).kind for run_id in ("r1", "r2")]
        in_use = await p.store.redis.zcard(p.store.keys("limit_calls", KEY))

    assert outcomes == [AttemptOutcome.FINISHED] * 2
    assert in_use == 0


async def test_concurrent_requests_of_two_workers_are_limited(redis_url: str) -> None:
    """While one request is in flight, the other run is parked; the end of the request calls it."""
    in_flight, most = 0, 0
    may_answer = asyncio.Event()

    async def model(_: dict[str, Any]) -> Sent:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await may_answer.wait()
        in_flight -= 1
        return ANSWER

    async with answering(model) as url:
        definition = talker(url)
        definition["llm"]["limits"] = {"key": "shared", "max_concurrency": 1}
        async with two(redis_url, definition) as (first, second):
            await submitted(first, "r1", "r2")
            executing = asyncio.create_task(first.execute("r1"))
            await await_for(lambda: in_flight, "the first request has arrived")
            parked = await second.execute("r2")
            may_answer.set()
            await executing
            await await_for(lambda: first.wakes, "the second run is called")
            await second.execute("r2")
            record = await second.record("r2")

    assert parked.reason.startswith("waiting for limit shared")
    assert [wake.run_id for wake in first.wakes] == ["r2"]
    assert record.state is RunState.COMPLETED
    assert most == 1


async def test_the_share_of_a_dead_worker_comes_back(redis_url: str) -> None:
    """It is killed while its request is in flight. Its run itself needs the share when it continues."""
    asked = 0

    def model(_: dict[str, Any]) -> Sent:
        nonlocal asked
        asked += 1
        return Sent((), JSON, hangs=True) if asked == 1 else ANSWER

    async with answering(model) as url:
        definition = talker(url)
        definition["llm"]["limits"] = {"key": "shared", "max_concurrency": 1}
        async with two(redis_url, definition) as (first, second):
            await submitted(first, "r1")
            executing = asyncio.create_task(first.execute("r1"))
            await await_for(lambda: asked, "the first request has arrived")
            await crash(first, "r1", executing)
            await second.execute("r1")
            record = await second.record("r1")

    assert record.state is RunState.COMPLETED


async def test_a_pause_that_a_provider_asks_one_worker_for_holds_for_the_other(redis_url: str) -> None:
    """A limit without numbers only shares such pauses."""
    asked = 0

    def model(_: dict[str, Any]) -> Sent:
        nonlocal asked
        asked += 1
        return SLOW if asked == 1 else ANSWER

    async with answering(model) as url:
        definition = talker(url)
        definition["llm"] |= {"limits": {"key": "shared"}, "retry": {"max_attempts": 2}}
        async with two(redis_url, definition) as (first, second):
            await submitted(first, "r1", "r2")
            refused = await first.execute("r1")
            parked = await second.execute("r2")
            asked_before = asked
            await pass_a_minute(second, "shared")
            called = await served(second)
            await second.execute("r2")
            record = await second.record("r2")

    assert refused.reason == "llm.rate_limit"
    assert parked.reason.startswith("waiting for limit shared")
    assert asked_before == 1
    assert called == ["r2"]
    assert record.state is RunState.COMPLETED


async def test_a_short_wait_is_waited_for_inside_the_call(redis_url: str) -> None:
    """Sixteen runs at once, at twenty requests a second: nobody is parked."""
    async with process(redis_url, limited({"requests_per_minute": 1_200})) as p:
        run_ids = [f"r{number}" for number in range(16)]
        await submitted(p, *run_ids)
        results = await asyncio.gather(*(p.execute(run_id) for run_id in run_ids))

    assert {result.kind for result in results} == {AttemptOutcome.FINISHED}


async def test_each_tenant_may_have_a_limit_of_its_own(redis_url: str) -> None:
    async with process(redis_url, limited({"key": "{tenant}", **ONE_A_MINUTE})) as p:
        await submitted(p, "r1", "r2", tenant="acme")
        await submitted(p, "r3", tenant="globex")
        kinds = [(await p.execute(run_id)).kind for run_id in ("r1", "r2", "r3")]

    assert kinds == [AttemptOutcome.FINISHED, AttemptOutcome.SUSPENDED, AttemptOutcome.FINISHED]


async def test_the_tokens_of_a_reply_are_settled(redis_url: str) -> None:
    """1,024 tokens are reserved for a reply that turns out to have ten."""
    usage = {"input_tokens": 10, "output_tokens": 10}
    definition = limited({"tokens_per_minute": 600}, script=[{"text": "hello", "usage": usage}] * 9)
    async with process(redis_url, definition) as p:
        await submitted(p, "r1")
        await p.execute("r1")
        next_us = int(await p.store.redis.hget(p.store.keys("limit", KEY), "next_tokens_us"))
        seconds, _ = await p.store.redis.time()

    assert next_us / 1e6 - seconds < 4


async def test_a_run_that_is_cancelled_while_it_waits_holds_no_request(redis_url: str) -> None:
    async with process(redis_url, limited({"requests_per_minute": 50})) as p:
        await submitted(p, "r1", "r2")
        await p.execute("r1")
        waiting = asyncio.create_task(p.execute("r2"))
        calls = p.store.keys("limit_calls", KEY)
        await await_for(lambda: p.store.redis.zcard(calls), "it has reserved")
        await p.store.run(scripts.cancel(run_id="r2", reason="enough", force=True))
        p.runner.latch("r2", LatchReason.CANCELLED)
        await waiting
        in_use = await p.store.redis.zcard(calls)

    assert in_use == 0
