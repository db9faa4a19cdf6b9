"""Tools that misbehave: they block the loop, hold the GIL, compute in another process, or kill it."""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Any

from openagents_worker import tool


@tool
async def oversleep(seconds: float) -> str:
    """Block the loop with a sleep."""
    time.sleep(seconds)
    return "slept"


@tool
def sleep_in_a_thread(seconds: float) -> str:
    """Sleep in a thread, which is allowed: the tool is not async."""
    time.sleep(seconds)
    return threading.current_thread().name


@tool
def hold() -> None:
    """Hold the GIL for ever."""
    re.match("^(a+)+$", "a" * 40 + "b")


@tool(cpu_bound=True)
def compute(upto: int) -> dict[str, int]:
    """Add numbers in another process."""
    return {"sum": sum(range(upto)), "pid": os.getpid()}


@tool(cpu_bound=True)
def crash() -> None:
    """End its process."""
    os._exit(1)


class Ponder:
    """A pattern that blocks the event loop outside any recorded call."""

    context: Any

    def __init__(self, config: Any = None) -> None:
        """It has no configuration."""

    async def execute(self) -> str:
        time.sleep(1.5)
        return "pondered"


class Recite:
    """A memory that blocks the event loop; it uses the session's state."""

    external = False

    def __init__(self, config: Any = None) -> None:
        """It has no configuration."""

    async def inject(self, context: Any) -> None:
        time.sleep(1.5)

    async def writeback(self, context: Any) -> None:
        """It stores nothing."""
