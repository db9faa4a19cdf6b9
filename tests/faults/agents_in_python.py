"""An agent in Python whose program calls functions, tools and the model, and whose workers are killed."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from openagents_worker import ChildRequest, RunContext, agent
from openagents_worker.errors import PermanentToolError
from tests.faults.plugins import Step

__all__ = ["borrower", "lender", "member", "program", "team"]

MODEL = {
    "provider": "openai_compatible",
    "model": "scripted",
    "api_base": os.environ.get("FAULTS_MODEL_URL", "http://127.0.0.1:1"),
    "api_key_env": "FAULTS_MODEL_KEY",
    "timeout_ms": 900_000,
    "retry": {"max_attempts": 12, "suspend_above_ms": 0},
}


async def on_the_loop(context: Any, n: str) -> dict[str, str]:
    done: dict[str, str] = await Step().invoke({"n": n, "ms": 10}, context)
    return done


def in_a_thread(context: Any, n: str) -> dict[str, str]:
    return asyncio.run(Step().invoke({"n": n, "ms": 10}, context))  # type: ignore[no-any-return]


async def around(context: Any, n: str) -> list[Any]:
    """Holds another call."""
    inner = await context.call_tool("step", {"n": f"{n}1"})
    return [inner, await on_the_loop(context, f"{n}2")]


@agent("program", llm=MODEL, tools=[{"id": "step", "impl": Step}])
async def program(context: RunContext) -> list[Any]:
    found = await asyncio.gather(
        context.step("on the loop", on_the_loop, context, "a1"),
        context.step("in a thread", in_a_thread, context, "b1"),
    )
    more = await context.step("around", around, context, "c")
    reply = await context.call_llm([{"role": "user", "content": "d1"}])
    return [*found, *more, reply.output_text]


@agent("team", llm=MODEL, tools=[{"id": "step", "impl": Step}])
async def team(context: RunContext) -> list[Any]:
    """Delegates to so many members, so many at once, each with so many levels below it."""
    children, at_once, levels = json.loads(context.input_text)
    await context.call_tool("step", {"n": "before"})
    asked = [
        ChildRequest(agent_id="member", input_text=json.dumps([number, levels])) for number in range(children)
    ]
    results = await context.delegate_many(asked, max_concurrency=at_once)
    await context.call_tool("step", {"n": "after"})
    return [result.output for result in results]


@agent("member", llm=MODEL, tools=[{"id": "step", "impl": Step}])
async def member(context: RunContext) -> int:
    number, levels = json.loads(context.input_text)
    # Longer than a parent waits before it parks.
    await context.call_tool("step", {"n": f"{number}-{levels}", "ms": 200})
    if levels:
        result = await context.delegate("member", json.dumps([number, levels - 1]))
        return int(result.output)
    return int(number)


@agent("lender", llm=MODEL, tools=[{"id": "step", "impl": Step}])
async def lender(context: RunContext) -> list[Any]:
    """Lends its session to two children, one after the other. It fails at its end if its input says so."""
    context.state["lender"] = "before"
    await context.call_tool("step", {"n": "before"})
    heard = []
    for name in ("one", "two"):
        result = await context.delegate("borrower", name, session_isolation="shared")
        heard.append([result.output, context.state["borrowers"]])
        await context.call_tool("step", {"n": f"after {name}"})
    if context.input_text == "fail":
        raise PermanentToolError("as it was told", "lender")
    return heard


@agent("borrower", llm=MODEL, tools=[{"id": "step", "impl": Step}])
async def borrower(context: RunContext) -> list[str]:
    """Answers with the questions before its own, and adds its name to the state of the session."""
    # Longer than a parent waits before it parks.
    await context.call_tool("step", {"n": context.input_text, "ms": 200})
    context.state["borrowers"] = [*context.state.get("borrowers", []), context.input_text]
    return [entry["content"] for entry in context.transcript if entry["role"] == "user"]
