"""The memory of a run that has ended is freed at once, without the garbage collector."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.runner import Process, agent, process, scripted

RUNS = 5


class Branches:
    """Calls its model and a tool in separate tasks."""

    context: Any

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        """Nothing is configured."""

    async def execute(self) -> Any:
        await asyncio.gather(self._branch(1), self._branch(2))
        return "done"

    async def _branch(self, n: int) -> None:
        await self.context.llm_client.generate(messages=[{"role": "user", "content": f"branch {n}"}])
        await self.context.tools["charge"].invoke({"who": f"branch {n}"})


@contextmanager
def garbage() -> Generator[list[Any]]:
    """The objects of the block that only the garbage collector can free."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    found: list[Any] = []
    try:
        yield found
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("pattern", ["react", "branches"])
async def test_a_run_leaves_nothing_to_the_garbage_collector(redis_url: str, pattern: str) -> None:
    """No object of the library is part of a reference cycle when its run has ended."""
    calls = {"name": "charge", "arguments": {"who": "me"}}
    llm = scripted({"text": "", "tool_calls": [calls]}, {"text": "done"})
    kind = {"type": "react"} if pattern == "react" else {"impl": f"{__name__}.Branches"}
    tools = [{"id": "charge", "impl": "tests.runtime.plugins.Charge"}]
    async with process(redis_url, agent(llm=llm, pattern=kind, tools=tools)) as p:
        await _execute(p, "first")  # objects created once per process are kept
        with garbage() as found:
            for number in range(RUNS):
                await _execute(p, f"r-{number}")
            await asyncio.sleep(0)

    ours = [type(one) for one in found if type(one).__module__.startswith("openagents_worker")]
    assert Counter(kind.__qualname__ for kind in ours) == {}


async def _execute(p: Process, run_id: str) -> None:
    await p.submit(run_id=run_id, session_id=run_id)
    assert (await p.runner.execute(run_id)).stop_reason == "completed"
