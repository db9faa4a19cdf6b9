"""A tool that ends only by a cancellation, and one that fails."""

from __future__ import annotations

import asyncio

from openagents_worker import tool

__all__ = ["break_down", "linger"]


@tool
async def linger() -> str:
    """Wait for ever."""
    await asyncio.Event().wait()
    return "gone"


@tool
async def break_down() -> str:
    """Raise an exception with a secret in its text."""
    raise ValueError("no answer from redis://:hunter2@shop/0")
