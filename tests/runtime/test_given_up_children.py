"""A delegation that the program has given up: its child ends, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

from openagents_worker import Agent
from openagents_worker.errors import RedisUnreachable
from openagents_worker.models import RunState
from openagents_worker.store import scripts
from openagents_worker.store.signals import signal_fact
from tests.runtime.delegating import agents
from tests.runtime.test_children import begin, children_of
from tests.runtime.waiting import retrieved
from tests.support.runner import Process, crash, process
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
    fact = {"name": signal_fact(name), "value": "1", "message_id": ""}
    await p.store.run(scripts.fact(run_id="r1", **fact, max_facts=9, max_bytes=999))


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
