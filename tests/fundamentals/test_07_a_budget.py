"""7. A budget bounds a run: its steps, its tool calls, its time, its cost."""

from __future__ import annotations

from openagents_worker import RunBudget, RunRequest, StopReason
from openagents_worker.producer.task import AgentTask
from tests.installation import Installation, Model, call

ASK_ON = [{"tool_calls": [call("price", item="pear")]}] * 10


def test_a_run_that_would_never_end_is_ended_after_its_steps(run_agent: AgentTask, model: Model) -> None:
    """A step is one turn of the model, with the calls that it asks for."""
    model.will_say(*ASK_ON)

    request = RunRequest(agent_id="clerk", session_id="steps", input_text="?", budget=RunBudget(max_steps=3))
    handle = run_agent.delay(request)

    assert handle.wait(timeout=60).stop_reason is StopReason.MAX_STEPS
    assert len(model.asked(handle.id)) == 3


def test_a_tool_call_beyond_the_budget_is_not_made(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """The limit is what really happens in the world."""
    model.will_say(*ASK_ON)

    request = RunRequest(
        agent_id="clerk", session_id="calls", input_text="?", budget=RunBudget(max_tool_calls=2)
    )
    handle = run_agent.delay(request)

    assert handle.wait(timeout=60).stop_reason is StopReason.MAX_STEPS
    assert len(shop.diary(handle.id)) == 2


def test_time_is_up_in_the_middle_of_a_call_too(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """The call is cancelled. Only time in which a worker works on the run counts."""
    model.will_say({"tool_calls": [call("deliver")]})

    request = RunRequest(
        agent_id="clerk", session_id="time", input_text="?", budget=RunBudget(max_duration_ms=300)
    )
    handle = run_agent.delay(request)

    assert handle.wait(timeout=60).stop_reason is StopReason.BUDGET_EXHAUSTED
    assert [line["what"] for line in shop.diary(handle.id)] == ["at the door", "sent away"]


def test_money_is_counted_after_every_reply(run_agent: AgentTask, model: Model) -> None:
    """The model is not asked again once the budget is spent, and the error says how much it was."""
    dear = {"input_tokens": 1_000_000, "output_tokens": 0}  # a dollar
    model.will_say(*({**turn, "usage": dear} for turn in ASK_ON))

    request = RunRequest(
        agent_id="clerk", session_id="money", input_text="?", budget=RunBudget(max_cost_usd=1.5)
    )
    handle = run_agent.delay(request)
    result = handle.wait(timeout=60)

    assert result.stop_reason is StopReason.BUDGET_EXHAUSTED
    assert result.error_details is not None
    assert result.error_details.context["current"] == 2.0
    assert len(model.asked(handle.id)) == 2
