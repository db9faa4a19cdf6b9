"""A program cancels a call while what has to be stored before it is being written, and Redis is away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from openagents_worker import Agent, RunContext
from openagents_worker.models import RunState
from openagents_worker.runtime import event_writer
from openagents_worker.runtime.latch import LatchReason
from tests.runtime.test_stop import worker
from tests.support.command_proxy import Command, Proxy
from tests.support.runner import Process, agent, scripted
from tests.support.waiting import await_for

PAID: list[str] = []


@pytest.fixture(autouse=True)
def _from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    PAID.clear()
    monkeypatch.setattr(event_writer, "FLUSH_S", 60.0)  # so that the writes of the call take what is queued


class Away:
    """A Redis that loses every write while it is `on`."""

    writes = frozenset({"emit", "commit", "intent", "ask", "delegate"})

    def __init__(self) -> None:
        self.on = False
        self.lost = 0

    async def before(self, command: Command) -> bool:
        is_lost = self.on and command.name in self.writes
        self.lost += is_lost
        return is_lost


@asynccontextmanager
async def shop(
    redis_url: str, program: Callable[[RunContext, Away], Awaitable[Any]]
) -> AsyncIterator[tuple[Process, Away]]:
    away, proxy = Away(), Proxy(redis_url)

    async def pattern(context: RunContext) -> Any:
        return await program(context, away)

    ask = {"id": "ask", "impl": "tests.runtime.plugins.Charge", "approval": "always"}
    shop_agent = Agent("a", pattern=pattern, llm=scripted({"text": "hello"}), tools=[ask])
    await asyncio.to_thread(proxy.__enter__)
    try:
        url = await asyncio.to_thread(proxy.url_of, "w")
        async with worker(url, shop_agent, agent("child")) as p:
            proxy.count(before=away.before)
            yield p, away
            proxy.count()
    finally:
        await asyncio.to_thread(proxy.__exit__)


async def pay(cents: int) -> str:
    PAID.append(f"{cents}")
    return "paid"


def effect(context: RunContext) -> Awaitable[Any]:
    return context.recorded(pay, idempotent=False)(5)


def approval(context: RunContext) -> Awaitable[Any]:
    return context.tools["ask"].invoke({"who": "nobody"})


def delegation(context: RunContext) -> Awaitable[Any]:
    return context.delegate("child", "hello")


async def begin(call: Awaitable[Any], away: Away) -> asyncio.Task[Any]:
    """A task that makes the call while Redis is away; its first write is lost."""
    away.on, away.lost = True, 0
    task: asyncio.Task[Any] = asyncio.ensure_future(_awaited(call))
    await await_for(lambda: away.lost, "a write is lost")
    return task


async def _awaited(call: Awaitable[Any]) -> Any:
    return await call


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def kinds_of_facts(p: Process) -> set[str]:
    names = await p.store.redis.hkeys(p.store.keys("facts", "r1"))
    return {name.split(":")[0] for name in names} - {"called"}


CALLS = [effect, approval, delegation]


@pytest.mark.parametrize("is_first", [True, False], ids=["the first call", "a later call"])
@pytest.mark.parametrize("call", CALLS)
async def test_nothing_is_lost_when_a_call_is_cancelled_before_it_begins(
    redis_url: str, call: Callable[[RunContext], Awaitable[Any]], is_first: bool
) -> None:
    """What is queued with the write is stored, and the program gets its cancellation after it."""

    async def program(context: RunContext, away: Away) -> str:
        if not is_first:
            await context.step("look", pay, 1)
        await context.emit("shop.opened")
        task = await begin(call(context), away)
        task.cancel()
        await turns()
        task.cancel()  # for example by a time limit of its own, and by its task group
        await turns()
        assert not task.done()
        away.on = False
        await asyncio.wait([task])
        assert task.cancelled()
        return str(await context.step("pay", pay, 2))

    async with shop(redis_url, program) as (p, _):
        await p.submit()
        await p.execute()
        record = await p.record()
        assert record.state is RunState.COMPLETED, record.result
        journal = await p.journal()
        assert journal[0]["call"] == "prepare"
        outcomes = [each["outcome"] for each in journal if each.get("kind") != "spent"]
        assert outcomes[1:] == [{"ok": "paid"}] * (not is_first) + [{"cancelled": True}, {"ok": "paid"}]
        names = await p.event_names()
        assert {"shop.opened", "run.attempt_started", "run.checkpoint_saved"} <= {*names}
        assert ["1"] * (not is_first) + ["2"] == PAID
        assert await kinds_of_facts(p) <= {"given_up"}


async def test_a_function_that_was_not_called_begins_again_after_a_hand_over(redis_url: str) -> None:
    """The worker stops while the intent is being written: nobody has to be asked about the call."""

    async def program(context: RunContext, away: Away) -> Any:
        away.on = away.lost == 0
        return await effect(context)

    async with shop(redis_url, program) as (p, away):
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: away.lost, "a write is lost")
        p.runner.latch("r1", LatchReason.HANDOVER)
        hurrying = asyncio.create_task(p.runner.hurry_all())
        await turns()
        away.on = False
        assert (await executing).reason == "handover"
        await hurrying
        assert PAID == []
        assert "intent" not in await kinds_of_facts(p)
        await p.execute()
        assert (await p.record()).state is RunState.COMPLETED
        assert PAID == ["5"]
        assert "run.outcome_unknown" not in await p.event_names()
