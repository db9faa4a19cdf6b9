"""A tool that returns the modules that its worker has imported."""

from __future__ import annotations

import sys

from openagents_worker import tool

__all__ = ["modules"]


@tool
async def modules() -> list[str]:
    """Return the names of the modules that this process has imported."""
    return sorted(sys.modules)
