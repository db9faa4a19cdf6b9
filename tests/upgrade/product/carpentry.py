"""The tool of a small product. What it does stands in a log outside the system, with whose code called it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any

import openagents_worker
from openagents_worker import tool


def _note(what: str, context: Any) -> None:
    line = {
        "what": what,
        "key": context.idempotency_key,
        "at": time.time(),
        "code": openagents_worker.__file__,
    }
    file = os.open(os.environ["CARPENTRY_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, (json.dumps(line) + "\n").encode())
    finally:
        os.close(file)


@tool
async def slip() -> str:
    """Fails as code does."""
    raise ValueError("the saw slipped")


@tool
async def saw(ms: int, context: Any) -> str:
    """Saws for so long."""
    _note("begin", context)
    await asyncio.sleep(ms / 1000)
    _note("end", context)
    return "sawn"


@tool
async def ask(context: Any) -> str:
    """Asks how long the board must be."""
    _note("begin", context)
    return f"{await context.receive('length')} cm"


@tool
async def dry(seconds: float, context: Any) -> str:
    """Lets the glue dry."""
    _note("begin", context)
    await context.sleep(seconds)
    return "dry"
