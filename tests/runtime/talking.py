"""An agent, its tools, and a real HTTP model server that refuses invalid requests like real chat APIs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from openagents_worker.patterns.base import PatternPlugin
from openagents_worker.testing.model_server import ModelServerRequest
from openagents_worker.tools import tool
from tests.support.runner import agent

BEGUN: list[str] = []
"""Runs whose tool `wait` was called."""
LET_GO: set[str] = set()
"""Runs in which `wait` does not wait."""


@tool(concurrency_safe=True)
async def add(x: int = 0, y: int = 0) -> int:
    """Adds."""
    return x + y


@tool
async def shout(text: str) -> str:
    """Converts the text to upper case."""
    return text.upper()


@tool
async def fail(text: str = "") -> None:
    """Fails."""
    raise ValueError("a bug in a tool")


@tool
async def wait(context: Any) -> str:
    """Waits until the test opens the gate."""
    BEGUN.append(context.run_id)
    if context.run_id not in LET_GO:
        await asyncio.Event().wait()
    return "gone"


class Own(PatternPlugin):
    """A custom pattern that makes one tool call itself, and lists it in `turn_messages`."""

    async def execute(self) -> str:
        result = await self.context.tools["add"].invoke({"x": 1})
        call = {"id": "own", "name": "add", "arguments": {"x": 1}}
        self.turn_messages = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "own", "name": "add", "content": str(result)},
        ]
        return "It is 1."


TOOLS = [{"id": name, "impl": f"tests.runtime.talking.{name}"} for name in ("add", "shout", "fail", "wait")]


def talker(url: str, **fields: Any) -> dict[str, Any]:
    """ReAct with the memory of the shipped assistant and a model without retries."""
    llm = {
        "provider": "openai_compatible",
        "api_base": url,
        "model": "m",
        "retry": {"max_attempts": 1},
        "pricing": {"input": 1.0, "output": 1.0},
    }
    memory = {"type": "window_buffer", "config": {"window_size": 20}}
    return agent(**{"llm": llm, "memory": memory, "tools": TOOLS, **fields})


class Script:
    """The replies of the model by run: turn n of a run gets reply n."""

    def __init__(self) -> None:
        self.by_run: dict[str, list[dict[str, Any]]] = {}
        self.asked: dict[str, list[ModelServerRequest]] = {}

    def __call__(self, asked: ModelServerRequest) -> Mapping[str, Any]:
        run_id = asked.headers["idempotency-key"].partition(":")[0]
        self.asked.setdefault(run_id, []).append(asked)
        entries = self.by_run[run_id]
        return entries[min(asked.n, len(entries) - 1)]
