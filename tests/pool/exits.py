"""User code that tries to end its process, or continues after the end of its run."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import redis

from openagents_worker import tool
from openagents_worker.patterns.base import PatternPlugin


def note(tag: str, what: str) -> None:
    """Store a line for the test, independent of the process."""
    with redis.Redis.from_url(os.environ["OPENAGENTS_REDIS_URL"]) as client:
        client.rpush(f"notes:{tag}", what)


EXITS: dict[str, Any] = {
    "SystemExit": lambda: sys.exit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "CancelledError": asyncio.CancelledError,
    "BaseException": BaseException,
    "StopIteration": StopIteration,
}


def raise_exit(kind: str) -> None:
    error = EXITS[kind]()
    if error is not None:
        raise error


@tool
async def leave_in_coroutine(kind: str) -> None:
    """Raise in a coroutine."""
    raise_exit(kind)


@tool(durable_idempotent=False)
def leave_in_thread(kind: str) -> None:
    """Raise in a thread."""
    raise_exit(kind)


@tool
async def leave_in_task(kind: str) -> None:
    """Raise in a new asyncio task."""

    async def work() -> None:
        raise_exit(kind)

    await asyncio.create_task(work())


@tool
async def leave_in_callback(kind: str) -> str:
    """Raise in a callback of the event loop, outside any task."""
    asyncio.get_running_loop().call_soon(raise_exit, kind)
    await asyncio.sleep(0.05)
    return "still here"


@tool
def block(seconds: float) -> str:
    """Block a thread."""
    time.sleep(seconds)
    return "slept"


class Ticking(PatternPlugin):
    """Record ticks in a separate asyncio task until it is stopped."""

    async def execute(self) -> Any:
        async def tick() -> None:
            while True:
                note(self.context.run_id, "tick")
                await asyncio.sleep(0.02)

        await asyncio.gather(tick())


class Leaving(PatternPlugin):
    """Call the tool named by the first word of the input with the second word; returns the outcome."""

    async def execute(self) -> Any:
        name, kind = self.context.input_text.split()
        if name == "pattern":
            raise_exit(kind)
        try:
            return {"got": await self.context.tools[name].invoke({"kind": kind})}
        except Exception as error:
            return {"error": str(error)}
