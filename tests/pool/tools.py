"""Tools that misbehave: they block the loop, keep the interpreter, compute in another process, or kill it."""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Any

from openagents_worker import tool


@tool
async def oversleep(seconds: float) -> str:
    """Sleeps where it should have awaited."""
    time.sleep(seconds)
    return "slept"


@tool
def sleep_in_a_thread(seconds: float) -> str:
    """Sleeps, which is fine: it is not async."""
    time.sleep(seconds)
    return threading.current_thread().name


@tool
def hold() -> None:
    """Keeps the interpreter to itself, for good."""
    re.match("^(a+)+$", "a" * 40 + "b")


@tool(cpu_bound=True)
def compute(upto: int) -> dict[str, int]:
    """Adds numbers in another process."""
    return {"sum": sum(range(upto)), "pid": os.getpid()}


@tool(cpu_bound=True)
def crash() -> None:
    """Takes its process down with it."""
    os._exit(1)


class Ponder:
    """A pattern that blocks the event loop, outside of any call."""

    context: Any

    def __init__(self, config: Any = None) -> None:
        """It has no configuration."""

    async def execute(self) -> str:
        time.sleep(1.5)
        return "pondered"


class Recite:
    """A memory that blocks the event loop; it lives in the session's state."""

    external = False

    def __init__(self, config: Any = None) -> None:
        """It has no configuration."""

    async def inject(self, context: Any) -> None:
        time.sleep(1.5)

    async def writeback(self, context: Any) -> None:
        """It keeps nothing."""
