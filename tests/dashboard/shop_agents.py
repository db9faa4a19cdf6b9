"""The agents and tools of the pages' tests: each makes one kind of run. The worker imports this module."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from openagents_worker import RunContext, agent, tool

__all__ = ["charge_card", "find_order", "send_parcel", "wait_for_payment"]

PRICES = {"A17": 120}


@tool
async def find_order(number: str) -> dict[str, Any]:
    """Find an order by its number."""
    return {"number": number, "cents": PRICES[number]}


@tool(approval="always")
async def refund(number: str, cents: int) -> str:
    """Pay an order back."""
    return f"paid {cents} cents back for {number}"


@tool(durable_idempotent=False)
async def charge_card(number: str) -> str:
    """Charge a card. The first call kills its worker in the middle."""
    os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.Event().wait()
    return number


@tool
async def send_parcel(number: str) -> str:
    """Send a parcel."""
    return f"<script>document.title='hacked'</script><img src=x onerror=alert(1)> sent {number}"


@agent("payments", llm="mock")
async def wait_for_payment(context: RunContext) -> str:
    """Waits until somebody sends `paid`."""
    return f"paid: {await context.receive('paid')}"


@agent("pricing", llm="mock")
async def pricing(context: RunContext) -> str:
    """Fails in its own code."""
    return price_text(context.input_text)


def price_text(number: str) -> str:
    return f"{PRICES[number]} cents"
