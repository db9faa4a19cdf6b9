"""7. A budget limits a run: its steps, its tool calls, its time, its cost."""

from __future__ import annotations

from openagents_worker import RunBudget, RunRequest, StopReason
from openagents_worker.producer.task import AgentTask
from tests.support.deployment import Installation, Model, call

ENDLESS_CALLS = [{"tool_calls": [call("price", item="pear")]}] * 10


def test_max_steps_ends_a_run_that_would_not_end(run_agent: AgentTask, model: Model) -> None:
    """A step is one model call and the tool calls that follow from it."""
    model.will_say(*ENDLESS_CALLS)

    request = RunRequest(agent_id="clerk", session_id="steps", input_text="?", budget=RunBudget(max_steps=3))
    handle = run_agent.delay(request)

    assert handle.wait(timeout=60).stop_reason is StopReason.MAX_STEPS
    assert len(model.asked(handle.id)) == 3


def test_tool_calls_beyond_the_budget_are_not_made(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """The diary shows how often the tool was really called."""
    model.will_say(*ENDLESS_CALLS)

    request = RunRequest(
        agent_id="clerk", session_id="calls", input_text="?", budget=RunBudget(max_tool_calls=2)
    )
    handle = run_agent.delay(request)

    assert handle.wait(timeout=60).stop_reason is StopReason.MAX_STEPS
    assert len(shop.diary(handle.id)) == 2


def test_max_duration_cancels_the_current_call(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """Only the time in which a worker executes the run counts, not the time in which it waits."""
    model.will_say({"tool_calls": [call("deliver")]})

    request = RunRequest(
        agent_id="clerk", session_id="time", input_text="?", budget=RunBudget(max_duration_ms=300)
    )
    handle = run_agent.delay(request)

    assert handle.wait(timeout=60).stop_reason is StopReason.BUDGET_EXHAUSTED
    assert [line["what"] for line in shop.diary(handle.id)] == ["delivery started", "delivery cancelled"]


def test_the_cost_is_checked_after_every_reply(run_agent: AgentTask, model: Model) -> None:
    """When the budget is spent, the model is not called again. The error contains the cost of the run."""
    one_dollar = {"input_tokens": 1_000_000, "output_tokens": 0}
    model.will_say(*({**turn, "usage": one_dollar} for turn in ENDLESS_CALLS))

    request = RunRequest(
        agent_id="clerk", session_id="money", input_text="?", budget=RunBudget(max_cost_usd=1.5)
    )
    handle = run_agent.delay(request)
    result = handle.wait(timeout=60)

    assert result.stop_reason is StopReason.BUDGET_EXHAUSTED
    assert result.error_details is not None
    assert result.error_details.context["current"] == 2.0
    assert len(model.asked(handle.id)) == 2
