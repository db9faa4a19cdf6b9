"""The tools of a small shop. What they do in the world stands in a diary that is no part of the system."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from openagents_worker import tool
from openagents_worker.errors import PermanentToolError, ToolUnavailableError
from openagents_worker.tools.base import ToolContext
from tests.diary import DIARY, note

PRICES = {"apple": 30, "pear": 40, "melon": 250}
DOOR = "the door is open"


@tool(concurrency_safe=True)
def price(item: str, context: ToolContext) -> int:
    """Says what an item costs, in cents.

    Args:
        item: What is to be bought.
    """
    note("asked", context, item=item)
    if item not in PRICES:
        raise PermanentToolError(f"there is no {item}", hint=f"there are: {', '.join(PRICES)}")
    return PRICES[item]


@tool
async def pay(cents: int, context: ToolContext) -> str:
    """Takes money."""
    note("paid", context, cents=cents)
    context.add_artifact("receipt", kind="text", payload=f"{cents} cents")
    return "paid"


@tool
async def deliver(context: ToolContext) -> str:
    """Delivers what was bought, once somebody opens the door."""
    note("at the door", context)
    try:
        while not (Path(os.environ[DIARY]) / DOOR).exists():
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        note("sent away", context)
        raise
    note("delivered", context)
    return "delivered"


@tool
async def ring(context: ToolContext) -> None:
    """Calls the supplier, who never answers at the first call."""
    note("rang", context)
    if not (calls := Path(os.environ[DIARY]) / f"{context.run_id} rang").exists():
        calls.touch()
        raise ToolUnavailableError("nobody answers", "ring")
