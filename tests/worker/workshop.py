"""Tools that record the begin and end of each call in the diary, and a custom pattern, memory and
assembler."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from openagents_worker import tool
from openagents_worker.context.assemblers import DefaultAssembler
from openagents_worker.errors import ModelRetryError, PermanentToolError
from openagents_worker.memory.base import MemoryContext, MemoryPlugin
from openagents_worker.memory.buffer import BufferMemory
from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.tools.base import ToolContext, ToolPlugin
from tests.support.diary import DIARY, note, read
from tests.support.waiting import PATIENCE_S, until_cancelled

TOGETHER_WITHIN_S = 10.0


@tool
async def count(number: int, context: ToolContext) -> dict[str, int]:
    """Return the number."""
    note("begin", context, tool="count", number=number)
    await asyncio.sleep(0)
    note("end", context, tool="count", number=number)
    return {"counted": number}


@tool(concurrency_safe=True)
async def meet(number: int, of: int, context: ToolContext) -> dict[str, int]:
    """Wait until `of` calls are inside this tool; calls with higher numbers return earlier."""
    note("begin", context, tool="meet", number=number)
    async with asyncio.timeout(TOGETHER_WITHIN_S):
        while _have("begin", context) < of or _have("end", context) < of - number:
            await asyncio.sleep(0.01)
    note("end", context, tool="meet", number=number)
    return {"met": number}


def _have(what: str, context: ToolContext) -> int:
    return [line["what"] for line in read(Path(os.environ[DIARY]), context.run_id)].count(what)


@tool
async def hang(context: ToolContext) -> None:
    """Wait to be cancelled, and record the end."""
    note("begin", context, tool="hang")
    try:
        await until_cancelled(PATIENCE_S)
    finally:
        note("cancelled", context, tool="hang")


@tool
async def block(context: ToolContext) -> None:
    """Block the event loop for one second."""
    note("begin", context, tool="block")
    time.sleep(1)


@tool
async def refuse(amount: int, context: ToolContext) -> dict[str, int]:
    """Pay an amount of at most ten."""
    note("begin", context, tool="refuse", amount=amount)
    if amount < 0:
        raise ModelRetryError("an amount is positive")
    if amount > 10:
        raise PermanentToolError(f"{amount} is too much", hint="at most 10")
    return {"paid": amount}


@tool(durable_idempotent=False)
async def ship(order: str, context: ToolContext) -> str:
    """Send a parcel."""
    note("begin", context, tool="ship")
    context.add_artifact("label", "text", f"parcel for {order}")
    await context.emit("parcel.shipped", order=order)
    return "sent"


class Desk(ToolPlugin):
    """One class with several tool ids; each has its own configured drawer."""

    name = "Desk"
    description = "Reads the content of the drawer."

    class Config(ToolPlugin.Config):
        drawer: str

    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> str:
        assert context is not None
        note("begin", context, tool=self.cfg.drawer)
        return f"from the {self.cfg.drawer}"


class Narrator(PatternPlugin):
    """A custom pattern that emits its plan and its phase."""

    async def execute(self) -> str:
        await self.emit("pattern.phase", phase="planning")
        await self.emit("pattern.plan_created", plan=["answer"])
        reply = await self.context.llm_client.generate(messages=[{"role": "user", "content": "Answer."}])
        return reply.output_text


class Forgetful(MemoryPlugin):
    """A memory whose store is never reachable."""

    async def inject(self, context: MemoryContext) -> None:
        raise ConnectionError("the memory store is unreachable")

    async def writeback(self, context: MemoryContext) -> None:
        raise ConnectionError("the memory store is unreachable")

    async def compact(self, context: MemoryContext) -> None:
        raise ConnectionError("the memory store is unreachable")


class ClumsyAssembler(DefaultAssembler):
    """An assembler whose `compact` fails."""

    async def compact(self, **_: Any) -> None:
        raise ValueError("the transcript cannot be shortened")


class TidyAssembler(DefaultAssembler):
    """An assembler whose `compact` has nothing to shorten."""

    async def compact(self, **_: Any) -> None: ...


class TidyMemory(BufferMemory):
    """A memory that is emptied after each run."""

    async def compact(self, context: MemoryContext) -> None:
        context.state.pop(self.cfg.state_key)
