"""A tool that holds a run until the test lets it go."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from openagents_worker import tool
from openagents_worker.tools.base import ToolContext
from tests.support.diary import DIARY, note

__all__ = ["hold", "let_go"]

GO = "go"


@tool
async def hold(context: ToolContext) -> str:
    """Returns when it is told to."""
    note("begin", context)
    while not (Path(os.environ[DIARY]) / GO).exists():
        await asyncio.sleep(0.01)
    note("end", context)
    return "held"


def let_go(folder: Path) -> None:
    (folder / GO).touch()
