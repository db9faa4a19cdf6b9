"""Recorded functions with effects: one that was interrupted is never called again unasked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from functools import partial
from typing import Any

import pytest

from openagents_worker import Agent, AsyncClient, RunContext
from openagents_worker.errors import PermanentToolError
from openagents_worker.models import RunState, WaitKind
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store import scripts
from tests.runtime.test_stop import worker
from tests.support.runner import Process, crash, process, scripted
from tests.support.waiting import await_for

PAID: list[str] = []
"""The idempotency keys with which money was paid, in order of the payments."""
GATES: dict[str, asyncio.Event] = {}
"""`payment`: the payments end once it is set. A new one in each test."""


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    PAID.clear()
    GATES["payment"] = asyncio.Event()


async def pay(cents: int, context: RunContext) -> date:
    PAID.append(context.idempotency_key)  # type: ignore[attr-defined]
    context.state["paid"] = cents
    await GATES["payment"].wait()
    if cents < 0:
        raise PermanentToolError("cannot be negative", "pay")
    return date(2026, 1, 2)


async def payer(context: RunContext, *, cents: int = 5) -> str:
    """Pays once; the output has the date in the declared type."""
    due = await context.recorded(pay, idempotent=False)(cents, context)
    return f"due {due:%d %B}"


async def debtor(context: RunContext) -> str:
    try:
        return await payer(context, cents=-5)
    except PermanentToolError as error:
        return error.message


PAYER = Agent("a", pattern=payer, llm=scripted({"text": "hello"}))


@asynccontextmanager
async def interrupted(redis_url: str) -> AsyncIterator[tuple[Process, AsyncClient]]:
    """The second of two workers. The first one has died after the payment, before its outcome was stored."""
    async with (
        process(redis_url, PAYER, name="one") as one,
        process(redis_url, PAYER, name="two") as two,
        AsyncClient(redis_url) as client,
    ):
        await one.submit()
        dying = asyncio.create_task(one.execute())
        await await_for(lambda: len(PAID) == 1, "the payment")
        await crash(one, "r1", dying)
        GATES["payment"].set()
        yield two, client


async def facts(p: Process) -> list[str]:
    stored: dict[str, str] = await p.store.redis.hgetall(p.store.keys("facts", "r1"))
    return sorted(stored)


async def is_resolved(p: Process) -> bool:
    return any(name.startswith("resolution:") for name in await facts(p))


async def ended(p: Process) -> Any:
    """The output of the run, or the code of its error."""
    await p.execute()
    result = (await p.record()).result
    assert result is not None
    return result.final_output if result.error_details is None else result.error_details.code


async def test_the_intent_is_stored_before_the_function_is_called(redis_url: str) -> None:
    """The record of the call replaces it. A function that may be repeated has none."""
    async with process(redis_url, PAYER) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: len(PAID) == 1, "the payment")
        names = await facts(p)
        assert sorted(name.split(":")[0] for name in names) == ["fence", "intent"]
        GATES["payment"].set()
        await executing
        assert await facts(p) == []
        assert (await p.journal())[-1]["outcome"] == {"ok": "2026-01-02"}


async def test_an_interrupted_function_waits_for_a_decision_and_is_called_again(redis_url: str) -> None:
    """The run parks as paused and holds no slot. The second call has the same key as the first one."""
    async with interrupted(redis_url) as (two, client):
        assert (await two.execute()).kind is AttemptOutcome.SUSPENDED
        record = await two.record()
        assert record.state is RunState.PAUSED
        (waiting,) = record.waiting
        assert (waiting.kind, waiting.name) == (WaitKind.OUTCOME, "pay")
        assert len(PAID) == 1
        assert (await two.event_names()).count("run.outcome_unknown") == 1
        await client.resolve("r1", "pay", "rerun", by="anna")
        assert await ended(two) == "due 02 January"
        assert len(PAID) == 2
        assert len(set(PAID)) == 1
        assert await facts(two) == []


@pytest.mark.parametrize(
    ("action", "result", "output"),
    [
        ("skip", "2026-03-04", "due 04 March"),
        ("skip", "soon", "step.failed"),  # it is not what the function returns
        ("fail", None, "run.outcome_unknown"),
    ],
)
async def test_a_person_decides_about_an_interrupted_function(
    redis_url: str, action: Any, result: Any, output: str
) -> None:
    """It is not called again. A given result gets the type that the function declares."""
    async with interrupted(redis_url) as (two, client):
        await two.execute()
        await client.resolve("r1", "pay", action, by="anna", result=result)
        assert await ended(two) == output
        assert len(PAID) == 1


async def test_a_decision_that_comes_while_the_run_is_prepared_counts(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with interrupted(redis_url) as (two, client):
        original = Recorder.call

        async def decided_first(self: Recorder, kind: str, *args: Any, **options: Any) -> Any:
            if kind == "step":
                await client.resolve("r1", "pay", "skip", by="anna", result="2026-03-04")
            return await original(self, kind, *args, **options)

        monkeypatch.setattr(Recorder, "call", decided_first)
        assert await ended(two) == "due 04 March"
        assert len(PAID) == 1


@pytest.mark.parametrize(
    ("pattern", "output"), [(payer, "due 02 January"), (debtor, "cannot be negative")], ids=["value", "error"]
)
async def test_a_worker_that_lost_the_run_reports_the_outcome_of_its_function(
    redis_url: str, pattern: Any, output: str
) -> None:
    """The function had ended, but the commit was refused. The next attempt takes the outcome as it is, with
    the change of the state."""
    payer_ = Agent("a", pattern=pattern, llm=scripted({"text": "hello"}))
    async with (
        process(redis_url, payer_, name="one") as one,
        process(redis_url, payer_, name="two") as two,
    ):
        await one.submit()
        executing = asyncio.create_task(one.execute())
        await await_for(lambda: len(PAID) == 1, "the payment")
        await two.store.redis.zadd(two.store.keys("workers"), {one.lease.incarnation: 1})
        await two.store.run(scripts.reclaim(limit=100, max_recoveries=50, blameless=False))
        GATES["payment"].set()
        assert (await executing).reason == "fenced"
        await await_for(partial(is_resolved, two), "the outcome is reported")
        assert await ended(two) == output
        assert len(PAID) == 1
        if pattern is payer:
            state = await two.store.redis.hgetall(two.store.keys("session_state", "s1"))
            assert json.loads(state["paid"]) == 5


async def test_a_function_is_not_called_by_a_worker_whose_lease_is_over(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker wakes after its intent was stored, too late to call the function. It tells the next one that
    nothing has happened, so nobody is asked."""
    GATES["payment"].set()
    async with process(redis_url, PAYER, name="one") as one, process(redis_url, PAYER, name="two") as two:
        await one.submit()
        original = RunWriter.write_intent

        async def late(self: RunWriter, *args: Any, **options: Any) -> str:
            decision = await original(self, *args, **options)
            one.lease.left_s = 0.0
            await two.store.redis.zadd(two.store.keys("workers"), {one.lease.incarnation: 1})
            await two.store.run(scripts.reclaim(limit=100, max_recoveries=50, blameless=False))
            return decision

        with monkeypatch.context() as patched:
            patched.setattr(RunWriter, "write_intent", late)
            await one.execute()
        assert PAID == []
        await await_for(partial(is_resolved, two), "the worker reports that nothing has happened")
        assert await ended(two) == "due 02 January"
        assert len(PAID) == 1


async def by_gather(context: RunContext) -> None:
    await asyncio.gather(context.sleep(3600), context.receive("go"))


async def by_group(context: RunContext) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(context.sleep(3600))
        group.create_task(context.receive("go"))


async def by_wait(context: RunContext) -> None:
    works = [context.sleep(3600), context.receive("go")]
    await asyncio.wait([asyncio.create_task(work) for work in works])


@pytest.mark.parametrize("waits", [by_gather, by_group, by_wait])
async def test_a_function_that_only_waits_begins_again_after_a_hand_over(redis_url: str, waits: Any) -> None:
    """Nobody has to be asked about it, whatever of asyncio it waits with."""

    async def pattern(context: RunContext) -> None:
        await context.recorded(waits, idempotent=False)(context)

    async with worker(redis_url, Agent("a", pattern=pattern, llm=scripted({"text": "hello"}))) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())

        def both_wait() -> bool:
            attempt = p.runner._attempts.get("r1")
            return (
                attempt is not None
                and attempt._recorder is not None
                and len(attempt._recorder.waits._open) == 2
            )

        await await_for(both_wait, "both calls wait")
        p.runner.latch("r1", LatchReason.HANDOVER)
        await p.runner.hurry_all()
        assert (await executing).reason == "handover"
        assert {name.split(":")[0] for name in await facts(p)} == {"called", "wait"}
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        assert "run.outcome_unknown" not in await p.event_names()


async def test_a_run_that_is_not_durable_stores_no_intent(redis_url: str) -> None:
    GATES["payment"].set()
    async with process(redis_url, PAYER) as p:
        await p.submit(durable=False)
        assert await ended(p) == "due 02 January"
        assert await facts(p) == []
