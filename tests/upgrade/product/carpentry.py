"""The tool of a small product. What it does stands in a log outside the system, with whose code called it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import openagents_worker
from openagents_worker import tool
from openagents_worker.tools.base import ToolExecutionSpec, ToolPlugin


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
async def hand_on(context: Any) -> str:
    """Asks another agent. Only a version that can do so executes it."""
    _note("hand_on", context)
    result = await context.delegate("asking", "build")
    return str(result.output)


@tool
async def let_in(context: Any) -> str:
    """Asks another agent, which works in the same session meanwhile."""
    _note("let_in", context)
    result = await context.delegate("asking", "look around", session_isolation="shared")
    return str(result.output)


@tool
async def dry(seconds: float, context: Any) -> str:
    """Lets the glue dry."""
    _note("begin", context)
    await context.sleep(seconds)
    return "dry"


@tool(durable_idempotent=False)
async def paint(context: Any) -> str:
    """Paints until the worker is killed."""
    _note("begin", context)
    await asyncio.Event().wait()
    return "painted"


class Varnish(ToolPlugin):
    """Varnishes, if somebody approves it."""

    name = "Varnish"
    description = "Varnishes."

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(approval_mode="always")

    async def invoke(self, params: dict[str, Any], context: Any) -> str:
        _note("begin", context)
        return "varnished"


class Fire(ToolPlugin):
    """Fires clay in a kiln, until there is a file `fired`. A version without jobs would call `invoke`."""

    name = "fire"
    description = "Fires clay."
    durable_idempotent = False

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec.model_validate({"background": True})

    async def invoke(self, params: dict[str, Any], context: Any) -> str:
        _note("invoked", context)
        return "broken"

    async def invoke_background(self, params: dict[str, Any], context: Any) -> dict[str, Any]:
        _note("begin", context)
        return {"job_id": "kiln"}

    async def poll_job(self, handle: Any, context: Any) -> dict[str, Any]:
        is_over = Path(os.environ["CARPENTRY_LOG"]).with_name("fired").exists()
        status = "succeeded" if is_over else "running"
        return {"status": status, "result": "fired", "poll_after_ms": 1_500}

    async def cancel_job(self, handle: Any, context: Any) -> bool:
        return True
