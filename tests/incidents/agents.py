"""Tools and an agent that make incidents. A file in the folder of the diary mends what is broken."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from openagents_worker import RunContext, agent, tool
from tests.incidents.files import CRASHES, KILLS, MENDED, PRICES
from tests.support.diary import DIARY

__all__ = ["block", "charge", "crash", "hang", "price", "pricing", "refund", "wait_in_thread"]


def file(name: str) -> Path:
    return Path(os.environ[DIARY]) / name


@tool
async def price(number: str) -> int:
    """The price of an article. It is unknown until the file is there."""
    prices = json.loads(file(PRICES).read_text()) if file(PRICES).exists() else {}
    return int(prices[number])


@agent("pricing", llm="mock", tools=[price])
async def pricing(context: RunContext) -> str:
    """Fails if its tool fails."""
    return f"{await context.call_tool('price', {'number': context.input_text})} cents"


@tool
async def hang() -> None:
    """Never return."""
    await asyncio.Event().wait()


@tool
async def block() -> None:
    """Block the event loop."""
    time.sleep(1.5)


@tool
def wait_in_thread() -> None:
    """The same, as a function that is not async."""
    time.sleep(1.5)


@tool(approval="always")
async def refund(cents: int) -> str:
    """Pay back."""
    return f"{cents} cents"


@tool(durable_idempotent=False)
async def charge() -> str:
    """Charge a card. It kills its worker once for each file."""
    if file(KILLS).exists():
        file(KILLS).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return "charged"


@tool
async def crash(context: Any) -> str:
    """End the process in the run whose id is in the file, as a segmentation fault does."""
    if file(CRASHES).read_text() == context.run_id and not file(MENDED).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return "fine"
