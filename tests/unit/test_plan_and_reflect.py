"""Plan-and-execute and reflexion: their phases, what the model is shown, and where they end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openagents_worker.errors import (
    BudgetExhausted,
    MaxStepsExceeded,
    OutputValidationError,
    PluginConfigError,
    ToolError,
)
from openagents_worker.llm.base import LLMResponse
from openagents_worker.models import RunBudget, RunRequest
from openagents_worker.patterns import BUILTIN_PATTERNS
from openagents_worker.patterns.turn import Conversation
from openagents_worker.tools import tool
from tests.unit.run_fakes import FakeRun, ScriptedModel, asks, execute, says

CALLED: list[str] = []


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    CALLED.clear()


@tool
async def look_up(word: str) -> str:
    """Looks a word up."""
    CALLED.append(word)
    if word == "bad":
        raise ToolError("no such word", "look_up")
    return f"about {word}"


def plan(*steps: str) -> LLMResponse:
    return says(json.dumps({"steps": steps}))


def run_of(*replies: Any, budget: RunBudget | None = None, **fields: Any) -> FakeRun:
    request = RunRequest(agent_id="a", session_id="s", input_text="x", run_id="r", budget=budget)
    run = FakeRun(ScriptedModel(*replies), run_request=request, **fields)
    return run.give(look_up=look_up.build())


def made(name: str, **config: Any) -> Any:
    return BUILTIN_PATTERNS[name](config)


def names(run: FakeRun) -> list[str]:
    """The events of the pattern, with their phase or action."""
    return [
        f"{name.removeprefix('pattern.')} {payload.get('phase') or payload.get('action') or ''}".strip()
        for name, payload in run.events
        if name.startswith("pattern.") and name != "pattern.step_started"
    ]


def last_user(run: FakeRun, at: int = -1) -> str:
    return str([m for m in run.llm_client.requests[at]["messages"] if m["role"] == "user"][-1]["content"])


# --- plan and execute ------------------------------------------------------------------------------------


async def test_a_plan_is_made_and_carried_out() -> None:
    """The plan's request shows the tools as text; each step is a user message; the last answer is output."""
    run = run_of(
        plan("look it up", "conclude"),
        asks(("look_up", {"word": "tea"})),
        says("found"),
        says("THE ANSWER"),
    )
    pattern = made("plan_execute", system_prompt="Be exact.")
    assert await execute(pattern, run) == "THE ANSWER"

    planning, first, _, last = run.llm_client.requests
    assert planning["tools"] is None
    assert planning["response_format"]["json_schema"]["name"] == "Plan"
    assert planning["messages"][0]["content"] == "Be exact."
    assert "- look_up: Looks a word up." in planning["messages"][-1]["content"]
    assert first["tools"] is not None
    assert [message["role"] for message in first["messages"]] == ["system", "user", "assistant", "user"]
    assert first["messages"][-1]["content"].startswith("Step 1 of 2: look it up")
    assert last["messages"][-1]["content"].startswith("Step 2 of 2: conclude")
    assert last["messages"][: len(first["messages"])] == first["messages"]  # prompt caches hit
    assert names(run) == [
        "phase planning",
        "step_finished plan",
        "plan_created",
        "phase executing",
        "step_finished tool_calls",
        "step_finished final",
        "step_finished final",
    ]
    assert [p["plan_step"] for n, p in run.events if n == "pattern.step_started" and "plan_step" in p] == [
        1,
        1,
        2,
    ]
    assert [message["role"] for message in pattern.turn_messages] == ["assistant", "tool"]


@pytest.mark.defect("P07")
async def test_p07_the_answer_of_the_model_is_the_result_also_without_tools() -> None:
    """P07: the original returns the constant 'Plan executed'."""
    assert await execute(made("plan_execute"), run_of(plan(), says("THE ANSWER"))) == "THE ANSWER"
    assert await execute(made("plan_execute"), run_of(plan("answer"), says("THE ANSWER"))) == "THE ANSWER"


@pytest.mark.defect("P02")
async def test_p02_history_and_memory_are_in_the_prompt_for_the_plan() -> None:
    """P02: as in the first request of a ReAct run."""
    past = [
        {"role": "user", "content": "hi", "run_id": "r0"},
        {"role": "assistant", "content": "hello", "run_id": "r0"},
    ]
    for name, replies in (("plan_execute", [plan(), says("a")]), ("reflexion", [says("a"), says("ACCEPT")])):
        run = run_of(*replies, transcript=past, memory_view={"facts": ["likes pears"]})
        await execute(made(name), run)
        messages = run.llm_client.requests[0]["messages"]
        assert [message["content"] for message in messages[1:3]] == ["hi", "hello"]
        assert "likes pears" in messages[3]["content"]


async def test_p03_a_plan_that_is_not_one_is_corrected() -> None:
    """P03: the reason reaches the model. After the last correction the run fails."""
    run = run_of(says("First, I …"), plan("answer"), says("done"))
    assert await execute(made("plan_execute"), run) == "done"
    assert "does not fit" in last_user(run, 1)
    assert [name for name, _ in run.events].count("validation.retry") == 1

    hopeless = run_of(*[says("no")] * 2, budget=RunBudget(max_validation_retries=1))
    with pytest.raises(OutputValidationError, match="Plan after 2 attempts"):
        await execute(made("plan_execute"), hopeless)


async def test_a_plan_has_at_most_so_many_steps() -> None:
    """The others are left out, and the event shows what is executed."""
    run = run_of(plan("a", "b", "c"), says("1"), says("2"))
    assert await execute(made("plan_execute", max_plan_steps=2), run) == "2"
    [created] = [payload for name, payload in run.events if name == "pattern.plan_created"]
    assert created == {"plan": ["a", "b"]}


@pytest.mark.defect("B05")
async def test_b05_a_budget_error_of_a_tool_ends_the_plan() -> None:
    """B05: the original shows it to the model as text, and goes on. An error of the tool is shown."""

    @tool(name="costly", description="Costs.")
    async def costly() -> None:
        raise BudgetExhausted("spent", kind="cost", current=2, limit=1)

    run = run_of(plan("a"), asks(("costly", {}))).give(costly=costly.build())
    with pytest.raises(BudgetExhausted):
        await execute(made("plan_execute"), run)

    run = run_of(plan("a"), asks(("look_up", {"word": "bad"})), says("sorry"))
    assert await execute(made("plan_execute"), run) == "sorry"
    assert "no such word" in run.llm_client.requests[-1]["messages"][-1]["content"]


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.defect("P10")
async def test_p10_the_steps_of_plan_and_execution_are_counted_together(limit: int) -> None:
    """P10: also by the budget of the request."""
    replies = [plan("a"), asks(("look_up", {"word": "x"})), asks(("look_up", {"word": "y"}))]
    run = run_of(*replies, budget=RunBudget(max_steps=limit))
    with pytest.raises(MaxStepsExceeded, match=rf"max_steps \({limit}\)"):
        await execute(made("plan_execute"), run)
    assert len(run.llm_client.requests) == limit


@pytest.mark.defect("P03")
async def test_p03_an_invalid_output_is_corrected_in_the_same_conversation() -> None:
    """P03: `try_again` of the pattern."""
    run = run_of(plan("a"), says("1"), says("2"))
    pattern = made("plan_execute")
    await execute(pattern, run)
    assert await pattern.try_again("not good") == "2"
    assert last_user(run) == "not good"
    assert run.llm_client.requests[-1]["messages"][-2]["content"] == "1"


# --- reflexion -------------------------------------------------------------------------------------------


async def test_an_accepted_answer_is_returned() -> None:
    """One review, which is not part of the conversation."""
    run = run_of(asks(("look_up", {"word": "tea"})), says("answer"), says("**ACCEPT**."))
    pattern = made("reflexion")
    assert await execute(pattern, run) == "answer"
    review = run.llm_client.requests[-1]
    assert review["tool_choice"] == "none"
    assert review["messages"][-2]["content"] == "answer"
    assert "ACCEPT" in review["messages"][-1]["content"]
    assert names(run) == [
        "phase answering",
        "step_finished tool_calls",
        "step_finished final",
        "phase reflecting",
        "step_finished reflection",
    ]
    assert [message["role"] for message in pattern.turn_messages] == ["assistant", "tool"]


async def test_a_review_reaches_the_model_and_the_better_answer_is_returned() -> None:
    """At most `max_reflections` times; the last answer is not reviewed any more."""
    run = run_of(says("1"), says("Too short."), says("2"), says("Still too short."), says("3"))
    assert await execute(made("reflexion", max_reflections=2), run) == "3"
    roles = [message["role"] for message in run.llm_client.requests[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "Still too short." in last_user(run)


async def test_a_review_needs_two_steps_that_are_left() -> None:
    """A finished answer is not lost to the limit of steps."""
    run = run_of(says("1"), says("Too short."), says("2"), budget=RunBudget(max_steps=2))
    assert await execute(made("reflexion"), run) == "1"
    assert len(run.llm_client.requests) == 1


def test_the_options_of_the_original_sdk_are_accepted() -> None:
    """Its reflexion calls the number of reviews max_retries."""
    assert made("reflexion", max_retries=1, max_steps=16, step_timeout_ms=30_000).cfg.max_reflections == 1
    assert made("plan_execute", max_steps=16, step_timeout_ms=30_000).cfg.max_plan_steps == 10
    with pytest.raises(PluginConfigError, match="max_reflexions"):
        made("reflexion", max_reflexions=1)


async def test_an_empty_review_accepts() -> None:
    """It has found nothing."""
    assert await execute(made("reflexion"), run_of(says("1"), says(" "))) == "1"
    assert await execute(made("reflexion", max_reflections=0), run_of(says("1"))) == "1"


# --- messages that are sent to the run -------------------------------------------------------------------


async def test_a_message_for_the_run_is_a_further_part_of_a_question_with_an_image() -> None:
    """The question stays a list of parts."""

    class Steered(FakeRun):
        async def take_steering(self, *, new: bool = True) -> list[str]:
            return ["Be brief."]

    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    run = Steered(ScriptedModel(says("a cat")))
    await Conversation(run, messages=[{"role": "user", "content": parts}]).ask(step=1)
    (message,) = run.llm_client.requests[0]["messages"]
    assert message["content"] == [*parts, {"type": "text", "text": "Be brief."}]
