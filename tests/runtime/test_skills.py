"""Skills in a run: what the model has loaded is recorded, and code is not run again on a guess."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openagents_worker.models import RunState, WaitKind
from tests.runtime import plugins
from tests.runtime.test_replay import executed_until, open_gates
from tests.support.runner import agent, calls, crash, process, scripted
from tests.unit.tools.test_skills import package

CODE = """
from tests.runtime import plugins

async def run_openagent_skill(payload):
    plugins.LOG.append(("begin", "skill", payload["net"]))
    await plugins.GATES["skill"].wait()
    plugins.LOG.append(("end", "skill", payload["net"]))
    return {"total": payload["net"] * 2}
"""
TURNS = (
    calls(("load_skill", {"name": "invoices"})),
    calls(("read_skill_file", {"name": "invoices", "path": "references/tax.md"})),
    calls(("run_skill", {"name": "invoices", "payload": {"net": 5}})),
    {"text": "done"},
)


def clerk(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """An agent and the section that gives it the skill, whose code is in a Python package of this name."""
    package(folder, "invoices", references__tax_md="19 %", **{f"src__{name}__entrypoint_py": CODE})
    return agent(llm=scripted(*TURNS)), {"type": "local", "config": {"search_paths": [str(folder)]}}


async def test_a_run_loads_reads_and_runs_a_skill(redis_url: str, tmp_path: Path) -> None:
    """The session has no state of it."""
    definition, skills = clerk(tmp_path, "runs_a_skill")
    open_gates("skill")
    async with process(redis_url, definition, skills=skills) as p:
        record = await p.run()
        results = [each["outcome"]["ok"] for each in await p.journal() if each["kind"] == "tool"]
        state = await p.store.redis.hgetall(p.store.keys("session_state", "s1"))

    assert record.state is RunState.COMPLETED
    loaded, read, ran = results
    assert loaded["instructions"] == "Do invoices."
    assert read == {"path": "references/tax.md", "content": "19 %"}
    assert ran == {"total": 10}
    assert not [key for key in state if "skill" in key]


async def test_code_that_a_dead_worker_has_begun_is_not_run_again_on_a_guess(
    redis_url: str, tmp_path: Path
) -> None:
    """The run asks. What was loaded before is not loaded again."""
    definition, skills = clerk(tmp_path, "begun_by_a_dead_worker")
    async with (
        process(redis_url, definition, skills=skills, name="one") as one,
        process(redis_url, definition, skills=skills, name="two") as two,
    ):
        await one.submit()
        dying = await executed_until(
            one, lambda: ("begin", "skill", 5) in plugins.LOG, "the code of the skill begins"
        )
        await crash(one, "r1", dying)
        (tmp_path / "invoices" / "references" / "tax.md").write_text("20 %")
        await two.execute()
        record = await two.record()

    assert record.state is RunState.PAUSED
    assert [(each.kind, each.name) for each in record.waiting] == [(WaitKind.OUTCOME, "run_skill")]
    assert plugins.LOG == [("begin", "skill", 5)]
