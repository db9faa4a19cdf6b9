"""A tool that only a cancellation ends."""

from __future__ import annotations

import asyncio

from openagents_worker import tool

__all__ = ["linger"]


@tool
async def linger() -> str:
    """Stays for ever."""
    await asyncio.Event().wait()
    return "gone"
