"""Execution specs: tools that must not be interrupted, that need others, and specs that are refused."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from openagents_worker import Agent, RunContext
from openagents_worker.agents import read_agents_file
from openagents_worker.jsontext import dumps
from openagents_worker.models import RunState
from openagents_worker.runtime.calls.guards import interruption as interruption_guard
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.start_checks import find_problems
from openagents_worker.runtime.toolsets import ListedTool
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.tools import JobStatus, ToolExecutionSpec
from openagents_worker.tools.jobs import status_of
from openagents_worker.tools.specs import spec_of
from tests.runtime.test_executors import GATES, MADE, Fixed, broken, caller, output, touch
from tests.support.runner import agent, process, scripted
from tests.support.waiting import await_for


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    MADE.clear()
    GATES["open"] = asyncio.Event()


class Careful(Fixed):
    """A tool that must not be interrupted."""

    durable_idempotent = False

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(interrupt_behavior="block")

    async def invoke(self, params: dict[str, Any], context: Any) -> str:
        MADE.append("begin")
        await GATES["open"].wait()
        MADE.append("end")
        return "done"


CAREFUL = {"id": "careful", "impl": f"{__name__}.Careful"}


async def test_a_tool_that_blocks_ends_before_its_run_is_cancelled(redis_url: str) -> None:
    """Its outcome is recorded, and nothing of the run is executed afterwards."""
    async with process(
        redis_url, caller(None, ("careful", {}), ("broken", {}), tools=[CAREFUL, broken])
    ) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: MADE, "the tool works")
        await p.store.run(scripts.cancel(run_id="r1", reason="", force=False))
        p.runner.latch("r1", LatchReason.CANCELLED)
        await p.event_names()
        assert MADE == ["begin"]
        GATES["open"].set()
        await executing
        assert MADE == ["begin", "end"]
        assert (await p.record()).state is RunState.CANCELLED
        (record,) = [each for each in await p.journal() if each["kind"] == "tool"]
        assert record["outcome"] == {"ok": "done"}


async def test_a_tool_that_blocks_for_too_long_is_cancelled_with_its_run(redis_url: str) -> None:
    """A third of the time that the code of a stopped run has."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_STOP_GRACE_S": "0.3"})
    definition = caller(None, ("careful", {}), tools=[CAREFUL])
    async with process(redis_url, definition, settings=settings) as p:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: MADE, "the tool works")
        await p.store.run(scripts.cancel(run_id="r1", reason="", force=False))
        p.runner.latch("r1", LatchReason.CANCELLED)
        await executing
        assert (await p.record()).state is RunState.CANCELLED
        assert MADE == ["begin"]
        assert p.left == []


@pytest.mark.parametrize("is_endless", [False, True])
async def test_a_tool_that_blocks_is_not_cancelled_by_its_pattern(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, is_endless: bool
) -> None:
    """The cancellation takes effect after the call, or after a limit."""
    monkeypatch.setitem(interruption_guard.__globals__, "LONGEST_BLOCK_S", 0.1 if is_endless else 60)

    async def impatient(context: RunContext) -> str:
        calling = asyncio.create_task(context.call_tool("careful"))
        await await_for(lambda: MADE, "the tool works")
        calling.cancel()
        if not is_endless:
            asyncio.get_running_loop().call_later(0.05, GATES["open"].set)
        await asyncio.wait([calling])
        return "cancelled" if calling.cancelled() else "not cancelled"

    definition = Agent("a", pattern=impatient, tools=[CAREFUL], llm=scripted())
    async with process(redis_url, definition) as p:
        await p.run()
        assert await output(p) == "cancelled"
        assert (["begin"] if is_endless else ["begin", "end"]) == MADE


class NeedsTouch(Fixed):
    def get_dependencies(self) -> list[str]:
        return ["touch"]


async def test_a_tool_needs_the_tools_that_it_calls(redis_url: str) -> None:
    """An agent without them is not accepted at the start of a worker; otherwise its runs fail."""
    needs = {"id": "needs", "impl": f"{__name__}.NeedsTouch"}
    async with process(redis_url, caller(None, ("needs", {}), tools=[needs, touch])) as p:
        await p.run()
        assert await output(p) == ["reached"]
    other = {"id": "tuch", "impl": "tests.runtime.test_executors.touch"}
    definition = agent(tools=[needs, other])
    async with process(redis_url, definition) as p:
        await p.submit("r2")
        await p.execute("r2")
        result = (await p.record("r2")).result
        assert result is not None
        assert result.error_details is not None
        assert result.error_details.code == "plugin.config"
        assert "'tuch'" in str(result.error_details.hint)
    (problem,) = find_problems(read_agents_file(dumps({"agents": [definition]}), env={}), {})
    assert problem.path == ("agents", 0, "tools", 0)


class Misspelled(Fixed):
    """A tool whose spec has the name of an option of `@tool`."""

    def execution_spec(self) -> ToolExecutionSpec:
        return ToolExecutionSpec(approval="always")  # type: ignore[call-arg]


def test_an_execution_spec_has_no_other_fields() -> None:
    """A misspelled field would make calls without the approval or the timeout that was meant."""
    definition = agent(tools=[{"id": "odd", "impl": f"{__name__}.Misspelled"}])
    (problem,) = find_problems(read_agents_file(dumps({"agents": [definition]}), env={}), {})
    assert "has no field 'approval'; did you mean 'approval_mode'?" in problem.text


@pytest.mark.parametrize(
    ("model", "fields", "meant"),
    [
        (ToolExecutionSpec, {"timeout_ms": 50}, "default_timeout_ms"),
        (ToolExecutionSpec, {"concurency_safe": True}, "concurrency_safe"),
        (JobStatus, {"status": "succeeded", "reslut": {"copies": 2}}, "result"),
    ],
)
def test_what_a_tool_says_has_no_unknown_fields(model: Any, fields: dict[str, Any], meant: str) -> None:
    with pytest.raises(ValidationError, match=f"did you mean '{meant}'?"):
        model(**fields)


def test_further_fields_of_other_classes_are_ignored() -> None:
    """Such as those of a newer version, of the original SDK, or of the answer of a service."""
    known = {"approval_mode": "always", "default_timeout_ms": 50}
    tool = SimpleNamespace(execution_spec=lambda: SimpleNamespace(model_dump=lambda: known | {"cost": 3}))
    assert spec_of(tool, "odd") == ToolExecutionSpec(approval_mode="always", default_timeout_ms=50)
    assert status_of({"status": "running", "queue": 7}, "odd") == JobStatus(status="running")


def test_a_listed_tool_may_have_the_spec_of_a_newer_version() -> None:
    """What was recorded of it may be read by a worker of this version."""
    described = {
        "name": "pay",
        "description": "Pays.",
        "parameters": {"type": "object"},
        "spec": {"approval_mode": "always", "cost": 3},
        "once": False,
    }
    assert ListedTool(described, "shop", None).execution_spec().approval_mode == "always"


class Odd(Fixed):
    """A tool whose spec is given by a test."""

    spec: ClassVar[dict[str, Any]] = {}

    def execution_spec(self) -> Any:
        return SimpleNamespace(model_dump=lambda: dict(self.spec))


@pytest.mark.parametrize(
    "spec",
    [
        {"interrupt_behavior": "blok"},
        {"approval_mode": "maybe"},
        {"default_timeout_ms": 0},
        {"cpu_bound": True},
        {"supports_streaming": True},
        {"background": True},
        {"concurrency_safe": "perhaps"},
    ],
    ids=lambda spec: next(iter(spec)),
)
def test_a_spec_that_has_no_effect_is_refused(monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any]) -> None:
    """Each field is used, or refused at the start of a worker."""
    monkeypatch.setattr(Odd, "spec", spec)
    definition = agent(tools=[{"id": "odd", "impl": f"{__name__}.Odd"}])
    definition["tools"][0]["impl"] = f"{__name__}.Described"
    (problem,) = find_problems(read_agents_file(dumps({"agents": [definition]}), env={}), {})
    assert next(iter(spec)) in problem.text or "background" in problem.text


class Described(Odd):
    def describe(self) -> dict[str, Any]:
        return {"name": "odd", "description": "Odd.", "parameters": {"type": "object"}}
