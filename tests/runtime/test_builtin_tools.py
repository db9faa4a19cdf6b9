"""Built-in tools in real runs: variables of a session, and random values after a crash."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from openagents_worker.models import RunState
from openagents_worker.tools.builtin.supervisor import descendants
from tests.support.runner import Process, agent, calls, crash, process, scripted
from tests.support.waiting import await_for

DONE = {"text": "done"}


def agent_with(tools: list[str], *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return agent(llm=scripted(*replies), tools=[{"id": kind, "type": kind} for kind in tools], **fields)


async def results(p: Process, run_id: str) -> list[Any]:
    """The results of the tool calls of a run that have succeeded, in order."""
    outcomes = [record["outcome"] for record in await p.journal(run_id) if record["kind"] == "tool"]
    return [outcome["ok"] for outcome in outcomes if "ok" in outcome]


async def test_variables_of_a_session_are_seen_by_its_later_runs_alone(redis_url: str) -> None:
    """A command sees them too. They are written when the run ends."""
    replies = [
        calls(("set_env", {"key": "MODE", "value": "mine"})),
        calls(("shell_exec", {"command": "env"})),
        DONE,
    ]
    setter = agent_with(["set_env", "shell_exec"], *replies)
    getter = agent_with(["get_env"], calls(("get_env", {"key": "MODE"})), DONE, agent_id="b")
    async with process(redis_url, setter, getter) as p:
        assert (await p.run("r1")).state is RunState.COMPLETED
        await p.run("r2", agent_id="b")
        await p.run("r3", agent_id="b", session_id="other")

        assert (await results(p, "r1"))[1]["stdout"] == "MODE=mine\n"
        assert (await results(p, "r2"))[0] == {"key": "MODE", "value": "mine", "exists": True}
        assert await results(p, "r3") == []
        assert "MODE may not be read" in str(await p.journal("r3"))


async def test_random_values_are_the_same_after_a_crash(redis_url: str, tmp_path: Path) -> None:
    """The first attempt dies in the command after them; the second has them from the journal."""
    first = calls(("uuid", {}), ("random_string", {}), ("random_int", {"count": 5}))
    wait = calls(("grep_files", {"path": str(tmp_path), "pattern": "(a+)+$"}))
    (tmp_path / "text").write_text("a" * 60 + "b")
    definition = agent_with(["uuid", "random_string", "random_int", "grep_files"], first, wait, DONE)
    before = descendants(os.getpid())
    async with process(redis_url, definition) as dead, process(redis_url, definition, name="x") as p:
        await dead.submit()
        executing = asyncio.create_task(dead.execute(), name="first attempt")
        await await_for(lambda: descendants(os.getpid()) - before, "the search runs")
        seen = await results(dead, "r1")
        await crash(dead, "r1", executing)
        assert descendants(os.getpid()) - before == set()
        (tmp_path / "text").write_text("")

        await p.execute()

        assert (await p.record()).state is RunState.COMPLETED
        assert len(seen) == 3
        assert (await results(p, "r1"))[:3] == seen
