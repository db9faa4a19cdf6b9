"""A delegation that the program has given up: its child ends, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from openagents_worker import Agent
from openagents_worker.errors import RedisUnreachable
from openagents_worker.models import RunRecord, RunState, StopReason
from openagents_worker.store import scripts
from openagents_worker.store.signals import signal_fact
from tests.runtime.delegating import agents
from tests.runtime.test_children import begin, cancel, children_of, finish, resume
from tests.runtime.waiting import retrieved
from tests.support.runner import Process, crash, process, scripted
from tests.support.waiting import await_for


class GivesUp:
    """Gives its child up, makes a call that does not end before the worker dies, and waits."""

    def __init__(self) -> None:
        self.calls = 0

    async def charge(self) -> None:
        self.calls += 1
        if self.calls == 1:
            await asyncio.Event().wait()

    async def __call__(self, context: Any) -> str:
        waiting = retrieved(context.delegate("worker", "slow"))
        await context.receive("go")
        waiting.cancel()
        await asyncio.wait([waiting])
        await context.step("charge", self.charge)
        await context.receive("end")
        return "gave up"

    def agent(self) -> Agent:
        async def gives_up(context: Any) -> str:
            return await self(context)

        return Agent("gives_up", pattern=gives_up, llm={"provider": "mock"})


async def send(p: Process, name: str) -> None:
    await send_to(p, "r1", name)


async def send_to(p: Process, run_id: str, name: str) -> None:
    fact = {"name": signal_fact(name), "value": "1", "message_id": ""}
    sent = await p.store.run(scripts.fact(run_id=run_id, **fact, max_facts=9, max_bytes=999))
    p.wakes += sent.wakes


async def test_a_child_that_was_given_up_ends_although_the_worker_died_before_it_was_cancelled(
    redis_url: str,
) -> None:
    """The next attempt cancels it again. It does not go on until its parent ends."""
    program = GivesUp()
    definitions = [*agents(), program.agent()]
    async with (
        process(redis_url, *definitions, name="one") as one,
        process(redis_url, *definitions, name="two") as two,
    ):
        original = one.store.run

        async def loses_the_cancellation(call: Any) -> Any:
            if call.script.name == "cancel":
                raise RedisUnreachable("the worker dies before it can say so")
            return await original(call)

        await begin(one, "gives_up", "x")
        await send(one, "go")
        one.store.run = loses_the_cancellation  # type: ignore[method-assign]
        executing = asyncio.create_task(one.execute())
        await await_for(lambda: program.calls == 1, "the child is given up")
        one.store.run = original  # type: ignore[method-assign]
        await crash(one, "r1", executing)
        [child] = await children_of(two)
        assert child.state is RunState.QUEUED

        await two.execute()
        assert not (await two.record()).state.is_terminal, "its end would cancel the child"

        async def is_cancelled() -> bool:
            return (await two.record(child.run_id)).state is RunState.CANCELLED

        await await_for(is_cancelled, "the child is cancelled")


# --- what it has used ------------------------------------------------------------------------------------


async def spends(context: Any) -> str:
    """Calls its model, and makes one call of a tool. Then it waits, and calls its model again."""
    await context.llm_client.generate(messages=[{"role": "user", "content": "first"}])
    await context.call_tool("charge", {"who": "x"})
    await context.receive("more")
    reply = await context.llm_client.generate(messages=[{"role": "user", "content": "second"}])
    return str(reply.output_text)


def spender() -> Agent:
    priced = {**scripted({"text": "one"}, {"text": "two"}), "pricing": {"input": 1, "output": 1}}
    charge = {"id": "charge", "impl": "tests.runtime.plugins.Charge"}
    return Agent("spends", pattern=spends, llm=priced, tools=[charge])


async def gives_up(context: Any) -> Any:
    """Gives its child up, and waits as often as its input says."""
    waiting = retrieved(context.delegate("spends", "x"))
    await context.receive("go")
    waiting.cancel()
    await asyncio.wait([waiting])
    for _ in range(int(context.input_text)):
        await context.receive("end")
    return context.usage.llm_calls


async def fails(context: Any) -> Any:
    """Fails while its child works, in its first life; the failing step succeeds in the next one."""

    async def step() -> str:
        if context.run_id not in FAILED:
            FAILED.add(context.run_id)
            raise ValueError("not yet")
        return "went"

    async def second() -> str:
        await context.receive("go")
        return str(await context.step("step", step))

    async with asyncio.TaskGroup() as group:
        child = group.create_task(context.delegate("spends", "x"))
        group.create_task(second())
    return child.result().output


FAILED: set[str] = set()


async def delegates(context: Any) -> Any:
    return (await context.delegate("spends", "x")).output


def spending() -> list[Agent]:
    patterns = (gives_up, fails, delegates)
    return [spender(), *(Agent(each.__name__, pattern=each, llm={"provider": "mock"}) for each in patterns)]


async def begin_spending(p: Process, agent_id: str, text: str = "x", **fields: Any) -> RunRecord:
    """A run whose child has used something, and waits. Returns the record of the child."""
    await begin(p, agent_id, text, **fields)
    [child] = await children_of(p)
    p.wakes.clear()
    await p.execute(child.run_id)
    child = await p.record(child.run_id)
    assert (child.state, child.usage.llm_calls, child.usage.tool_calls) == (RunState.WAITING, 1, 1)
    assert child.usage.cost_usd
    return child


async def spent_records(p: Process) -> list[dict[str, Any]]:
    return [record for record in await p.journal() if record["kind"] == "spent"]


async def test_what_a_given_up_child_has_used_counts_once_in_the_usage_of_its_parent(redis_url: str) -> None:
    """It is recorded when the child has ended, by whichever attempt notices that. The program does not see it
    in its own usage, because that is the same in every attempt."""
    async with process(redis_url, *spending()) as p:
        child = await begin_spending(p, "gives_up", "2")
        await send(p, "go")
        await p.execute()

        async def is_cancelled() -> bool:
            return (await p.record(child.run_id)).state is RunState.CANCELLED

        await await_for(is_cancelled, "the child is cancelled")
        for _ in range(2):
            await send(p, "end")
            await p.execute()
        record = await p.record()
        assert record.result is not None
        assert record.result.final_output == 0
        assert record.usage == record.result.usage
        assert (record.usage.llm_calls, record.usage.tool_calls) == (1, 1)
        assert record.usage.cost_usd == child.usage.cost_usd
        assert [each["name"] for each in await spent_records(p)] == [child.run_id]
        assert await p.store.redis.hgetall(p.store.keys("facts", "r1")) == {}


async def test_a_run_that_ends_at_once_after_it_has_given_a_child_up_counts_it(redis_url: str) -> None:
    """It looks for the end of the child before it writes its own."""
    async with process(redis_url, *spending()) as p:
        await begin_spending(p, "gives_up", "0")
        await send(p, "go")
        await p.execute()
        record = await p.record()
        assert record.result is not None
        assert (record.usage.llm_calls, record.result.usage.llm_calls) == (1, 1)
        assert len(await spent_records(p)) == 1


@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("command", range(2, 9))  # the first one is the claim
async def test_it_counts_once_whatever_command_the_worker_dies_at(
    redis_url: str, command: int, is_stored: bool
) -> None:
    """Before Redis gets the command, or before the worker gets the answer."""
    async with (
        process(redis_url, *spending(), name="one") as one,
        process(redis_url, *spending(), name="two") as two,
    ):
        await begin_spending(one, "gives_up", "1")
        await send(one, "go")
        original, numbers, dies = one.store.run_until, itertools.count(1), asyncio.Event()

        async def dies_at_command(call: Any, must_stop: Any, **options: Any) -> Any:
            if (is_last := next(numbers) == command) and is_stored:
                await original(call, must_stop, **options)
            if is_last or dies.is_set():
                dies.set()
                await asyncio.Event().wait()
            return await original(call, must_stop, **options)

        one.store.run_until = dies_at_command  # type: ignore[method-assign]
        executing, dying = asyncio.create_task(one.execute()), asyncio.create_task(dies.wait())
        await asyncio.wait({executing, dying}, return_when=asyncio.FIRST_COMPLETED)
        one.store.run_until = original  # type: ignore[method-assign]
        dying.cancel()
        await two.store.redis.zadd(two.store.keys("workers"), {one.lease.incarnation: 1})
        one.lease.left_s = 0.0
        await two.store.run(
            scripts.reclaim(limit=100, max_recoveries=50, blameless=False)
        )  # unless it is parked
        executing.cancel()
        await asyncio.wait([executing])
        await send(two, "end")
        for _ in range(5):
            await two.execute()
        record = await two.record()
        assert record.result is not None
        assert record.result.final_output == 0
        assert (record.usage.llm_calls, record.result.usage.llm_calls) == (1, 1)
        assert len(await spent_records(two)) == 1
        left = await two.store.redis.hkeys(two.store.keys("facts", "r1"))
        assert [name for name in left if name.startswith(("given_up:", "delegated:", "child:"))] == []


async def test_what_children_have_used_so_far_counts_in_the_result_of_a_cancelled_parent(
    redis_url: str,
) -> None:
    """The parent is parked, so a script ends it. Its next life gets the result of the child, which counts
    once."""
    async with process(redis_url, *spending()) as p:
        child = await begin_spending(p, "delegates")
        await cancel(p)
        record = await p.record()
        assert record.result is not None
        assert record.usage == record.result.usage
        assert (record.usage.llm_calls, record.usage.tool_calls) == (1, 1)
        assert record.usage.cost_usd == child.usage.cost_usd

        await resume(p)
        assert (await p.record()).usage.llm_calls == 0, "the child goes on"
        await send_to(p, child.run_id, "more")
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == "two"
        assert record.usage == record.result.usage
        assert (record.usage.llm_calls, record.usage.tool_calls) == (2, 1)


async def test_a_child_of_a_task_group_that_has_failed_goes_on_in_the_next_life(redis_url: str) -> None:
    """The program has given it up. What it uses counts once, in each life and over both of them."""
    FAILED.clear()
    async with process(redis_url, *spending()) as p:
        child = await begin_spending(p, "fails")
        await send(p, "go")
        await p.execute()
        record = await p.record()
        assert (record.state, record.usage.llm_calls) == (RunState.FAILED, 1)
        assert (await p.record(child.run_id)).state is RunState.CANCELLED

        await resume(p)
        await send_to(p, child.run_id, "more")
        record = await finish(p)
        assert record.result is not None
        assert record.result.final_output == "two"
        assert record.usage == record.result.usage
        assert (record.usage.llm_calls, record.usage.tool_calls) == (2, 1)
        assert await p.store.redis.hgetall(p.store.keys("facts", "r1")) == {}


async def test_the_budget_is_reserved_until_a_given_up_child_has_ended(redis_url: str) -> None:
    """Else the next child would get what the first one is still using."""

    async def tries_twice(context: Any) -> Any:
        waiting = retrieved(context.delegate("spends", "x"))
        await context.receive("go")
        waiting.cancel()
        await asyncio.wait([waiting])
        return (await context.delegate("spends", "again")).output

    own = Agent("tries_twice", pattern=tries_twice, llm={"provider": "mock"})
    async with process(redis_url, *spending(), own) as p:
        first = await begin_spending(p, "tries_twice", budget={"max_tool_calls": 3})
        await send(p, "go")
        await finish(p)
        _, second = await children_of(p)
        assert first.request is not None
        assert first.request.budget is not None
        assert first.request.budget.max_tool_calls == 3
        assert second.request is not None
        assert second.request.budget is not None
        assert second.request.budget.max_tool_calls == 2
        await send_to(p, second.run_id, "more")
        record = await finish(p)
        assert (record.usage.llm_calls, record.usage.tool_calls) == (3, 2)


async def test_a_run_parks_until_a_given_up_child_gives_its_budget_back(redis_url: str) -> None:
    """The worker of the child cannot be reached, so it goes on for a while. Its end wakes the run."""

    async def tries_twice(context: Any) -> Any:
        waiting = retrieved(context.delegate("spends", "x"))
        await context.receive("go")
        waiting.cancel()
        await asyncio.wait([waiting])
        return (await context.delegate("worker", "again")).output

    own = Agent("tries_twice", pattern=tries_twice, llm={"provider": "mock"})
    async with process(redis_url, *agents(), *spending(), own) as p:
        child = await begin_spending(p, "tries_twice", budget={"max_tool_calls": 1})
        original = p.store.run

        async def loses_the_cancellation(call: Any) -> Any:
            if call.script.name == "cancel":
                raise RedisUnreachable("it cannot be told")
            return await original(call)

        p.store.run = loses_the_cancellation  # type: ignore[method-assign]
        await send(p, "go")
        await p.execute()
        p.store.run = original  # type: ignore[method-assign]
        record = await p.record()
        assert (record.state, [wait.name for wait in record.waiting]) == (RunState.WAITING_CHILD, ["budget"])
        p.wakes.clear()
        await cancel(p, child.run_id)
        assert "r1" in [wake.run_id for wake in p.wakes]

        record = await finish(p)
        assert record.result is not None
        assert record.result.stop_reason is StopReason.BUDGET_EXHAUSTED
        assert record.usage.tool_calls == 1
        assert len(await children_of(p)) == 1
