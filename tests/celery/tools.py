"""A tool that ends only by a cancellation, one that fails, and a pattern that delegates."""

from __future__ import annotations

import asyncio
from typing import Any

from openagents_worker import tool

__all__ = ["break_down", "linger", "manage"]


@tool
async def linger() -> str:
    """Wait for ever."""
    await asyncio.Event().wait()
    return "gone"


@tool
async def break_down() -> str:
    """Raise an exception with a secret in its text."""
    raise ValueError("no answer from redis://:hunter2@shop/0")


async def manage(context: Any) -> Any:
    """The pattern of an agent that lets the clerk do its work."""
    return (await context.delegate("clerk", context.input_text)).output
