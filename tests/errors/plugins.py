"""Somebody's plugins, and what goes wrong in them. No run of theirs ends with an error of the library's that
they have raised themselves."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from openagents_worker import RunContext, register_deps, tool
from openagents_worker.errors import RAISED_BY_PLUGINS, OpenAgentsError, ToolRateLimitError
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.tools import JobHandle, JobStatus, ToolContext, ToolExecutionSpec, ToolPlugin

__all__ = [
    *("HINT", "PAYMENTS", "Buggy", "Cancelled", "Numbers", "PassesOn", "Pays", "Quitter"),
    *(
        "await_answer",
        "asker",
        "complain",
        "crash",
        "endless",
        "dawdle",
        "echo",
        "pay",
        "pile",
        "scribe",
        "spoil",
    ),
]

HINT = "ask whoever wrote the plugin"


def closed() -> None:
    """Somebody's database, which is away."""
    raise ConnectionError("nobody answers")


register_deps("closed", closed)


@tool
async def complain(code: str) -> None:
    """Raises the error with this code, one of those that only plugins raise."""
    named: dict[str, type[OpenAgentsError]] = {error.code: error for error in RAISED_BY_PLUGINS}
    raise named[code](f"the plugin says {code}", hint=HINT)


@tool
async def await_answer(context: ToolContext) -> Any:
    """Waits for an answer, for a moment."""
    return await context.receive("answer", timeout=0.01)


@tool
async def crash() -> None:
    """Has a bug."""
    raise ZeroDivisionError("one by nothing")


@tool(timeout_ms=50)
async def dawdle() -> None:
    """Takes longer than it may."""
    await asyncio.Event().wait()


PAYMENTS: list[str] = []


@tool(durable_idempotent=False)
async def pay() -> None:
    """Begins to pay, and takes for ever."""
    PAYMENTS.append("begun")
    await asyncio.Event().wait()


class Pays(PatternPlugin):
    """Pays."""

    async def execute(self) -> None:
        await self.context.tools["pay"].invoke({})


@tool
async def pile() -> Any:
    """Gives lists in lists, a hundred and one."""
    value: Any = "at the bottom"
    for _ in range(101):
        value = [value]
    return value


@tool
async def spoil(context: ToolContext) -> None:
    """Writes into the session what its memory cannot read."""
    context.state["memory_buffer"] = "not a list"


@tool
async def echo(number: int) -> int:
    """Gives a number back; below zero it asks for patience."""
    if number < 0:
        raise ToolRateLimitError("not yet", "echo", retry_after_ms=1)
    return number


class PassesOn(PatternPlugin):
    """Calls the tool `complain` with its input, and raises its exception unchanged."""

    async def execute(self) -> Any:
        return await self.context.tools["complain"].invoke({"code": self.context.input_text})


class Numbers(PatternPlugin):
    """Has its numbers echoed; `drifts`: larger ones in every attempt of this process."""

    attempts = itertools.count()

    class Config(PatternPlugin.Config):
        numbers: list[int]
        drifts: bool = False

    async def execute(self) -> None:
        more = next(Numbers.attempts) if self.cfg.drifts else 0
        for number in self.cfg.numbers:
            await self.context.tools["echo"].invoke({"number": number + more if number > 0 else number})


class Buggy(PatternPlugin):
    """Has a bug."""

    async def execute(self) -> None:
        raise LookupError("nothing there")


async def scribe(context: RunContext) -> tuple[int, int]:
    """Has a bug in a step."""
    return await context.step("divide", divmod, 1, 0)


async def asker(context: RunContext) -> Any:
    """Asks an agent that fails, with a tool."""
    return await context.call_tool("ask", {"agent_id": "buggy", "input_text": "Go."})


async def endless(context: RunContext) -> Any:
    """Delegates to itself."""
    return (await context.delegate("endless", "Go.")).output


class Quitter(PatternPlugin):
    """Cancels itself."""

    async def execute(self) -> None:
        me = asyncio.current_task()
        assert me is not None
        me.cancel()
        await asyncio.sleep(0)


class Cancelled(ToolPlugin):
    """Starts a job that somebody cancels at its service."""

    name = "cancelled"
    description = "Starts a job."

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(background=True)

    async def invoke_background(self, params: dict[str, Any], context: Any) -> JobHandle:
        return JobHandle(job_id="1")

    async def poll_job(self, handle: JobHandle, context: Any) -> JobStatus:
        return JobStatus(status="cancelled")

    async def cancel_job(self, handle: JobHandle, context: Any) -> bool:
        return False
