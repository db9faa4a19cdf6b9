"""A tool with an effect that must not happen twice: it writes a line into a book outside of the system.

The book is how the demo proves its point: not the system says how often the tool ran, the book does.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from openagents_worker.tools.base import ToolPlugin


class Ledger(ToolPlugin):
    """Notes a figure. Takes a moment, as a call over a network would."""

    name = "ledger"
    description = "Notes a figure under a name in the project's ledger. Call it once for every figure."

    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "What the figure is."},
                "value": {"type": "number", "description": "The figure."},
            },
            "required": ["name", "value"],
            "additionalProperties": False,
        }

    async def invoke(self, params: dict[str, Any], context: Any) -> dict[str, Any]:
        await asyncio.sleep(0.3)  # the way to the book and back
        line = {**params, "key": context.idempotency_key, "pid": os.getpid(), "at": time.time()}
        await asyncio.to_thread(_write, json.dumps(line) + "\n")
        return {"noted": params["name"]}


def _write(line: str) -> None:
    with Path(os.environ["DEMO_LEDGER"]).open("a") as book:
        book.write(line)
