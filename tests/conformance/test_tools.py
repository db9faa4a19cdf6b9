"""Every type of tool, in a run whose worker dies after the call: the call is not made again."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.models import RunState
from openagents_worker.tools import tool
from openagents_worker.tools.builtin import BUILTIN_TOOLSETS, TOOL_TYPES
from tests.support import mcp_server
from tests.support.runner import Process, agent, calls, crash, process, scripted
from tests.support.waiting import await_for
from tests.unit.tools.rows import ROWS, filled, prepared
from tests.unit.tools.test_builtin import an_http_server

ENDS_THE_RUN = {"transfer"}
PARKS = {"delegate", "transfer"}
"""The run is parked inside the call. The attempt after it makes the call again, and finds the child."""
WAITING: list[str] = []
GATE: list[asyncio.Event] = []


@tool
async def hold(context: Any) -> str:
    """Waits until the test opens the gate."""
    WAITING.append(context.run_id)
    await GATE[0].wait()
    return "gone"


def called(kind: str, folder: Path, url: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """A tool of this type in the agents file, and the name and the arguments of a call."""
    if kind in BUILTIN_TOOLSETS:
        return OF_TOOLSETS[kind](folder)
    row = ROWS[kind]
    return (
        {"id": "tried", "type": kind, "config": filled(row.config, folder, url)},
        "tried",
        filled(row.good, folder, url),
    )


def _mcp(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    log = folder / "mcp.jsonl"
    log.touch()
    server = {"command": sys.executable, "args": ["-I", "-S", mcp_server.__file__, str(log)]}
    return {"id": "srv", "type": "mcp", "config": {"server": server}}, "add", {"a": 1, "b": 2}


OF_TOOLSETS = {"mcp": _mcp}
"""A toolset has no row: a function makes its tool, and names a call."""


async def until_it_holds(p: Process) -> asyncio.Task[Any]:
    """The attempt of the run that has come to the tool `hold`, or has ended. Its children are executed."""
    while True:
        executing = asyncio.create_task(p.execute())
        await await_for(lambda done=executing.done: done() or WAITING, "the run waits")
        children = [wake.run_id for wake in p.wakes if wake.run_id != "r1"]
        if not executing.done() or not children:
            return executing
        p.wakes.clear()
        for child_id in children:
            await p.execute(child_id)
        p.wakes.clear()


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(TOOL_TYPES))
async def test_a_finished_call_is_not_repeated(redis_url: str, kind: str, tmp_path: Path) -> None:
    """Its result is JSON, it is counted once, and one event has its end."""
    WAITING.clear()
    GATE[:] = [asyncio.Event()]
    async with an_http_server(asyncio.Event()) as url:
        ref, name, arguments = called(kind, prepared(tmp_path), url)
        definition = agent(
            "tries",
            tools=[ref, {"id": "hold", "impl": f"{__name__}.hold"}],
            llm=scripted(calls((name, arguments)), calls(("hold", {})), {"text": "done"}),
        )
        child = agent("a", llm={"provider": "mock"})
        async with (
            process(redis_url, definition, child, name="one") as one,
            process(redis_url, definition, child, name="two") as two,
        ):
            await one.submit(agent_id="tries")
            executing = await until_it_holds(one)
            if kind not in ENDS_THE_RUN:
                await crash(one, "r1", executing)
                GATE[0].set()
                await two.execute()
            record, journal, events = await two.record(), await two.journal(), await two.events()

    assert record.state is RunState.COMPLETED, record.result
    of_tool = [event["name"] for event in events if event["payload"].get("tool_id") == name]
    assert of_tool.count("tool.called") == 1
    if kind in ENDS_THE_RUN:
        assert "tool.succeeded" not in of_tool
        return
    (entry,) = [each for each in journal if (each["kind"], each["name"]) == ("tool", name)]
    assert json.loads(json.dumps(entry["outcome"], allow_nan=False)).keys() == {"ok"}
    assert of_tool.count("tool.succeeded") == 1
    assert record.usage.tool_calls == 2
