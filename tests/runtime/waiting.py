"""Patterns and tools that wait for signals and times. Tests assert on `plugins.LOG`."""

from __future__ import annotations

import asyncio
from typing import Any

from openagents_worker.errors import SignalTimeout
from tests.runtime import plugins


def retrieved(coro: Any) -> asyncio.Task[Any]:
    """A task whose exception is retrieved when it is stopped: a worker does this with every task of a run."""
    task = asyncio.create_task(coro)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task


class _Pattern:
    context: Any

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    async def charge(self, who: str) -> Any:
        gate = {"gate": "open"} if who == "before" and self.config.get("gated") else {}
        return await self.context.tools["charge"].invoke({"who": who, **gate})


class Receives(_Pattern):
    """Charges, receives `count` values of a signal, charges again."""

    async def execute(self) -> Any:
        await self.charge("before")
        options = {key: self.config[key] for key in ("timeout", "default") if key in self.config}
        try:
            values = [
                await self.context.receive("paid", **options) for _ in range(self.config.get("count", 1))
            ]
        except SignalTimeout as error:
            values = [error.code, error.signal]
        await self.charge("after")
        return values


class Sleeps(_Pattern):
    """Charges, sleeps, charges again."""

    async def execute(self) -> Any:
        await self.charge("before")
        await self.context.sleep(self.config["delay"])
        await self.charge("after")
        return "slept"


class Branches(_Pattern):
    """Branches that receive or sleep side by side, started in one of the ways of asyncio."""

    def _as(self, way: str) -> Branches:
        other = Branches({**self.config, "way": way})
        other.context = self.context
        return other

    async def execute(self) -> Any:
        way, context = self.config.get("way", "gather"), self.context
        names = self.config["names"]

        async def branch(name: str) -> Any:
            if name.startswith("sleep"):
                await context.sleep(float(name.removeprefix("sleep")))
                return name
            if name.startswith("charge"):
                await context.tools["charge"].invoke({"who": name, "gate": name})
                return name
            value = await context.receive(name)
            await self.charge(name)
            return [name, value]

        if way == "gather":
            return await asyncio.gather(*map(branch, names))
        if way == "group":
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(branch(name)) for name in names]
            return [task.result() for task in tasks]
        if way == "first":
            tasks = [retrieved(branch(name)) for name in names]
            done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            return [task.result() for task in done]
        if way == "wait_for":
            return await asyncio.wait_for(Branches.execute(self._as("group")), 3600)
        if way == "delegate_many":
            return await context.delegate_many([{"agent_id": "a", "input_text": name} for name in names])
        assert way == "as_completed", way
        return sorted(
            [str(await each) for each in asyncio.as_completed([retrieved(branch(name)) for name in names])]
        )


class BranchesInAStep(Branches):
    """The same, inside a recorded function."""

    async def execute(self) -> Any:
        return await self.context.step("branches", super().execute)


class Chance(_Pattern):
    """Draws values from every source of chance before and after a wait."""

    async def execute(self) -> Any:
        before = await self._draw()
        await self.context.receive("go")
        return [*before, *await self._draw()]

    async def _draw(self) -> list[Any]:
        context = self.context
        at = await context.now()
        drawn = [at.isoformat(), str(context.uuid4()), context.random().random()]
        plugins.LOG.append(("drawn", *drawn))
        return drawn


class AskTool:
    """A tool that charges inside, waits for a value, and charges again."""

    durable_idempotent = True

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}

    def describe(self) -> dict[str, Any]:
        return {"name": "ask", "description": "Asks.", "parameters": {"type": "object"}}

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        plugins.LOG.append(("begin", "ask"))
        await context.tools["charge"].invoke({"who": "inside"})
        value = await context.receive("answer")
        await context.tools["charge"].invoke({"who": "inside again"})
        return {"answer": value}


class Beside(_Pattern):
    """A charge that waits for a value, and another call beside it."""

    async def execute(self) -> Any:
        tools = self.context.tools
        return await asyncio.gather(
            tools["charge"].invoke({"who": "waits"}),
            tools["beside"].invoke({"who": "beside", "gate": "beside"}),
        )


class ChargesThenLooks(plugins.OnceOnly):
    """Has its effect, waits for the gate `inside`, and calls another tool."""

    async def invoke(self, params: dict[str, Any], context: Any) -> Any:
        charged = await super().invoke(params, context)
        await plugins.GATES["inside"].wait()
        await self.then(context)
        return charged

    async def then(self, context: Any) -> None:
        await context.tools["beside"].invoke({"who": "inside"})


class ChargesThenWaits(ChargesThenLooks):
    """Has its effect, waits for the gate `inside`, and for a value."""

    async def then(self, context: Any) -> None:
        await context.receive("go")


class BesideAModel(_Pattern):
    """A charge, and a call of a model beside it."""

    async def execute(self) -> Any:
        async def ask() -> Any:
            await plugins.GATES["ask"].wait()
            return await self.context.llm_client.generate(messages=[{"role": "user", "content": "hi"}])

        charged, _ = await asyncio.gather(self.context.tools["charge"].invoke({"who": "once"}), ask())
        return charged


class Fickle(plugins.Charge):
    """Needs an approval the first time it is asked, and none afterwards."""

    asked = 0

    def requires_approval(self, params: dict[str, Any], context: Any) -> bool:
        Fickle.asked += 1
        return Fickle.asked == 1


class DrawsIds(_Pattern):
    """Charges under ids that it draws: one after the other, then two side by side."""

    async def execute(self) -> Any:
        async def charge(who: str) -> str:
            await self.context.tools["charge"].invoke({"who": who, "gate": "charge"})
            return who

        one = [await charge(str(self.context.uuid4())) for _ in range(2)]
        ids = [f"{self.context.random().random()}" for _ in range(2)]
        return [*one, *await asyncio.gather(*map(charge, ids))]
