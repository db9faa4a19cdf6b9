"""The built-in patterns in real runs: model calls are recorded, limits cancel, nothing is repeated."""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

import pytest

from openagents_worker import Agent, tool
from openagents_worker.errors import StepTimeoutError
from openagents_worker.models import RunState, StopReason
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.runtime.runner import AttemptOutcome
from tests.support.runner import calls, crash, due, process, scripted
from tests.support.waiting import await_for, until_cancelled


class Seen:
    called: ClassVar[list[str]] = []
    cancelled: ClassVar[int] = 0
    hold: ClassVar[asyncio.Event | None] = None


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    Seen.called, Seen.cancelled, Seen.hold = [], 0, None


@tool
async def look(word: str) -> str:
    """Looks a word up; `slow` hangs the first time."""
    Seen.called.append(word)
    if word == "slow" and Seen.called.count("slow") == 1:
        try:
            await until_cancelled()
        except asyncio.CancelledError:
            Seen.cancelled += 1
            raise
    return f"about {word}"


@tool
async def wait_here() -> str:
    """Waits for the test."""
    Seen.called.append("wait_here")
    assert Seen.hold is not None
    await Seen.hold.wait()
    return "waited"


def plan(*steps: str) -> dict[str, Any]:
    return {"text": json.dumps({"steps": steps})}


def replies(name: str, *of_tools: dict[str, Any]) -> list[dict[str, Any]]:
    """What a model says in a run of the pattern that makes these tool calls and answers `done`."""
    return {
        "react": [*of_tools, {"text": "done"}],
        "plan_execute": [plan("look", "answer"), *of_tools, {"text": "looked"}, {"text": "done"}],
        "reflexion": [
            *of_tools,
            {"text": "draft"},
            {"text": "Too short."},
            {"text": "done"},
            {"text": "ACCEPT"},
        ],
    }[name]


def agent_with(name: str, *of_tools: dict[str, Any], **options: Any) -> Agent:
    llm = scripted(*replies(name, *of_tools))
    return Agent("a", pattern=name, llm=llm, tools=[look, wait_here], **options)


every_pattern = pytest.mark.parametrize("name", sorted(BUILTIN_PATTERNS))


@every_pattern
@pytest.mark.defect("D11")
async def test_d11_every_model_call_is_recorded_counted_and_told(redis_url: str, name: str) -> None:
    """D11: plan_execute and reflexion of the original call the model past the runtime."""
    expected = len(replies(name, calls(("look", {"word": "tea"}))))
    async with process(redis_url, agent_with(name, calls(("look", {"word": "tea"})))) as p:
        record = await p.run()
        journal, events = await p.journal(), await p.event_names()
    assert record.result is not None
    assert record.result.final_output == "done"
    assert record.usage.llm_calls == expected
    assert sum(each.get("kind") == "model" for each in journal) == expected
    assert (events.count("llm.called"), events.count("llm.succeeded")) == (expected, expected)
    assert (record.usage.tool_calls, Seen.called) == (1, ["tea"])


@every_pattern
async def test_a_pattern_continues_after_a_crash(redis_url: str, name: str) -> None:
    """No finished call is made again, and no event is told twice."""
    of_tools = [calls(("look", {"word": "tea"})), calls(("wait_here", {}))]
    definition = agent_with(name, *of_tools)
    Seen.hold = asyncio.Event()
    async with process(redis_url, definition, name="w1") as p, process(redis_url, definition, name="w2") as q:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: "wait_here" in Seen.called, "the second tool waits")
        await crash(p, "r1", executing)
        Seen.hold.set()
        await q.execute()
        record, events = await q.record(), await q.events()
    assert record.result is not None
    assert record.result.final_output == "done"
    assert Seen.called == ["tea", "wait_here", "wait_here"]
    assert record.usage.llm_calls == len(replies(name, *of_tools))
    phases = [event["payload"]["phase"] for event in events if event["name"] == "pattern.phase"]
    assert (
        phases
        == {
            "react": [],
            "plan_execute": ["planning", "executing"],
            "reflexion": ["answering", "reflecting", "answering", "reflecting"],
        }[name]
    )


@every_pattern
@pytest.mark.defect("P11")
async def test_p11_a_step_that_takes_too_long_is_cancelled_and_retried(redis_url: str, name: str) -> None:
    """P11: the tool does not go on in the background, and earlier steps are not repeated."""
    of_tools = [calls(("look", {"word": "tea"})), calls(("look", {"word": "slow"}))]
    async with process(redis_url, agent_with(name, *of_tools, runtime={"step_timeout_ms": 300})) as p:
        await p.submit()
        result = await p.execute()
        assert (result.kind, result.reason) == (AttemptOutcome.SUSPENDED, StepTimeoutError.code)
        assert Seen.cancelled == 1
        await due(p)
        await p.execute()
        record = await p.record()
    assert record.state is RunState.COMPLETED
    assert Seen.called == ["tea", "slow", "slow"]


@every_pattern
@pytest.mark.defect("B05")
async def test_b05_no_pattern_swallows_a_budget(redis_url: str, name: str) -> None:
    """B05: the run ends with the stop reason of the budget."""
    of_tools = [calls(("look", {"word": "tea"})), calls(("look", {"word": "milk"}))]
    async with process(redis_url, agent_with(name, *of_tools)) as p:
        record = await p.run(budget={"max_tool_calls": 1})
    assert record.result is not None
    assert record.result.stop_reason is StopReason.MAX_STEPS
    assert Seen.called == ["tea"]


@every_pattern
@pytest.mark.defect("P03")
async def test_p03_an_output_that_does_not_fit_is_corrected_by_the_model(redis_url: str, name: str) -> None:
    """P03: each pattern has the correction in its conversation."""
    script = scripted(*replies(name), {"text": '{"word": "tea"}'})
    definition = Agent("a", pattern=name, llm=script)
    schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    async with process(redis_url, definition) as p:
        record = await p.run(output_type=schema)
        events = await p.event_names()
    assert record.result is not None
    assert record.result.final_output == {"word": "tea"}
    assert events.count("validation.retry") == 1
