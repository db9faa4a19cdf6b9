"""The tools of a small shop. They write what they do to a diary, a file that the system does not know."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

from openagents_worker import tool
from openagents_worker.errors import PermanentToolError, ToolUnavailableError
from openagents_worker.tools.base import ToolContext
from tests.support.diary import DIARY, note

PRICES = {"apple": 30, "pear": 40, "melon": 250}
DELIVERY_ALLOWED = "delivery-allowed"
"""The tool `deliver` waits until a file of this name exists in the folder of the diary."""


@tool(concurrency_safe=True)
def price(item: str, context: ToolContext) -> int:
    """Returns the price of an item in cents.

    Args:
        item: The item to buy.
    """
    note("price", context, item=item)
    if item not in PRICES:
        raise PermanentToolError(f"the shop does not sell {item}", hint=f"it sells {', '.join(PRICES)}")
    return PRICES[item]


@tool
async def pay(cents: int, context: ToolContext) -> str:
    """Accepts a payment."""
    note("paid", context, cents=cents)
    context.add_artifact("receipt", kind="text", payload=f"{cents} cents")
    return "paid"


@tool
async def deliver(context: ToolContext) -> str:
    """Delivers the order as soon as the test allows it."""
    note("delivery started", context)
    try:
        while not (Path(os.environ[DIARY]) / DELIVERY_ALLOWED).exists():
            await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        note("delivery cancelled", context)
        raise
    note("delivered", context)
    return "delivered"


@tool
async def ring(context: ToolContext) -> None:
    """Phones the supplier, who answers only the second call."""
    note("phoned", context)
    if not (first_call := Path(os.environ[DIARY]) / f"{context.run_id} phoned").exists():
        first_call.touch()
        raise ToolUnavailableError("the supplier does not answer", "ring")


@tool
async def ask_the_customer(question: str, context: ToolContext) -> Any:
    """Asks the customer, whose answer may take days."""
    note("asked", context, question=question)
    return await context.receive("answer")


@tool
async def wait_for_the_bank(hours: float, context: ToolContext) -> str:
    """Waits until the bank has booked the payment."""
    await context.sleep(timedelta(hours=hours))
    note("booked", context)
    return "booked"
