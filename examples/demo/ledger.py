"""A tool whose effect must not happen twice: it adds a line to a file that the system does not know.

The demo counts the lines of this file to see how often the tool was executed.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from openagents_worker import ToolPlugin


class Ledger(ToolPlugin):
    """Adds a figure to the ledger. It takes 0.3 s, like a call over a network."""

    name = "ledger"
    description = "Adds a named figure to the project's ledger. Call it once for every figure."

    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {
                "name": {"type": "string", "description": "The name of the figure."},
                "value": {"type": "number", "description": "The figure."},
            },
            "required": ["name", "value"],
            "additionalProperties": False,
        }

    async def invoke(self, params: dict[str, Any], context: Any) -> dict[str, Any]:
        await asyncio.sleep(0.3)  # the time of a network call
        line = {**params, "key": context.idempotency_key, "pid": os.getpid(), "at": time.time()}
        await asyncio.to_thread(_write, json.dumps(line) + "\n")
        return {"noted": params["name"]}


def _write(line: str) -> None:
    with Path(os.environ["DEMO_LEDGER"]).open("a") as ledger:
        ledger.write(line)
