"""Agents that delegate to others. Tests assert on `CALLS`: the runs whose own work was done, in order."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from openagents_worker import Agent
from openagents_worker.errors import PermanentToolError
from openagents_worker.models import ChildRequest
from tests.support.runner import Process

CALLS: list[str] = []


async def charge(text: str) -> str:
    CALLS.append(text)
    return text


async def worker(context: Any) -> str:
    """Charges, then answers, or fails if its input says so."""
    text = await context.step("charge", charge, context.input_text)
    if text.startswith("fail"):
        raise PermanentToolError(f"no: {text}", "charge")
    return f"done: {text}"


async def level(context: Any) -> str:
    """Delegates to itself until the number in its input is 0."""
    left = int(context.input_text)
    await context.step("charge", charge, f"level {left}")
    if left == 0:
        return "bottom"
    result = await context.delegate("level", str(left - 1))
    return f"{left} {result.output}"


async def parent(context: Any) -> Any:
    """Delegates as its input, JSON, says: a list of requests, one after the other."""
    found = []
    for request in json.loads(context.input_text):
        result = await context.delegate(**request)
        found.append([result.stop_reason, result.final_output])
        await context.step("charge", charge, f"after {request['input_text']}")
    return found


async def side_by_side(context: Any) -> Any:
    """Delegates to all at once."""
    asked = json.loads(context.input_text)
    results = await asyncio.gather(*(context.delegate(**request) for request in asked))
    return [result.final_output for result in results]


async def many(context: Any) -> Any:
    asked = json.loads(context.input_text)
    results = await context.delegate_many(
        [ChildRequest(**request) for request in asked["requests"]],
        max_concurrency=asked.get("max_concurrency"),
    )
    return [
        result.final_output if result.ok else result.error_details.code  # a failed child has an error
        for result in results
    ]


async def hands_over(context: Any) -> Any:
    """Transfers the run; `except Exception` does not keep it."""
    with suppress(Exception):
        await context.transfer("worker", context.input_text)
    return "not reached"


def agents(**more: Any) -> list[Agent]:
    patterns = (worker, level, parent, side_by_side, many, hands_over)
    llm = {"provider": "mock"}
    return [Agent(pattern.__name__, pattern=pattern, llm=llm, **more) for pattern in patterns]


def to(text: str, agent_id: str = "worker", **more: Any) -> dict[str, Any]:
    return {"agent_id": agent_id, "input_text": text, **more}


async def execute_all(p: Process) -> list[str]:
    """Execute the runs whose wake-ups were sent, one at a time, until none is left. Returns their ids."""
    executed = []
    while p.wakes:
        wake = p.wakes.pop(0)
        if not wake.is_ended:
            executed.append(wake.run_id)
            await p.execute(wake.run_id)
    return executed
