"""A tool that only a cancellation ends, and one that fails."""

from __future__ import annotations

import asyncio

from openagents_worker import tool

__all__ = ["break_down", "linger"]


@tool
async def linger() -> str:
    """Stays for ever."""
    await asyncio.Event().wait()
    return "gone"


@tool
async def break_down() -> str:
    """Fails as code does."""
    raise ValueError("no answer from redis://:hunter2@shop/0")
