"""User code that tries to end the process it runs in, or to outlive its run."""

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
    """A line that the test can read, whatever becomes of the process."""
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


def leave(how: str) -> None:
    made = EXITS[how]()
    if made is not None:
        raise made


@tool
async def leave_in_coroutine(how: str) -> None:
    """Tries to leave."""
    leave(how)


@tool(durable_idempotent=False)
def leave_in_thread(how: str) -> None:
    """Tries to leave from a thread."""
    leave(how)


@tool
async def leave_in_task(how: str) -> None:
    """Tries to leave from a task of its own."""

    async def work() -> None:
        leave(how)

    await asyncio.create_task(work())


@tool
async def leave_in_callback(how: str) -> str:
    """Tries to leave from a callback of the event loop, which belongs to nobody."""
    asyncio.get_running_loop().call_soon(leave, how)
    await asyncio.sleep(0.05)
    return "still here"


@tool
def block(seconds: float) -> str:
    """Blocks a thread."""
    time.sleep(seconds)
    return "slept"


class Ticking(PatternPlugin):
    """Notes every moment that it is at work, in a task of its own, until it is stopped."""

    async def execute(self) -> Any:
        async def tick() -> None:
            while True:
                note(self.context.run_id, "tick")
                await asyncio.sleep(0.02)

        await asyncio.gather(tick())


class Leaving(PatternPlugin):
    """Calls the tool that is named first in the input with what is named second, and says what came of it."""

    async def execute(self) -> Any:
        name, how = self.context.input_text.split()
        if name == "pattern":
            leave(how)
        try:
            return {"got": await self.context.tools[name].invoke({"how": how})}
        except Exception as error:
            return {"error": str(error)}
