"""8. A failure is either over by itself after a while, or it is not; the code of an error says which."""

from __future__ import annotations

from openagents_worker import RunRequest, StopReason
from openagents_worker.producer.task import AgentTask
from tests.installation import Installation, Model, call


def test_a_model_that_is_busy_is_asked_again(run_agent: AgentTask, model: Model) -> None:
    """At once, a few times, and never earlier than it has asked for; the run notices nothing."""
    model.will_say({"error": "rate_limit", "retry_after_ms": 50}, {"text": "Here I am."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="busy", input_text="Hello?"))
    result = handle.wait(timeout=60)

    assert result.final_output == "Here I am."
    assert result.usage.llm_retry_count == 1
    assert handle.record().attempt == 1


def test_a_model_that_stays_busy_lets_the_run_wait(run_agent: AgentTask, model: Model) -> None:
    """It is put aside until it is due again, and no worker is kept for it; then it goes on where it was."""
    model.will_say({"error": "rate_limit", "retry_after_ms": 10, "times": 3}, {"text": "Here I am."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="busier", input_text="Hello?"))
    names = [event.name for event in handle.events()]

    assert "run.retry_scheduled" in names
    assert handle.wait(timeout=60).final_output == "Here I am."
    assert handle.record().attempt == 2


def test_a_tool_that_may_succeed_later_is_tried_later(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """Its error says so: `ToolUnavailableError` is retryable, `PermanentToolError` is told to the model."""
    model.will_say({"tool_calls": [call("ring")]}, {"text": "They answered."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="ring", input_text="Call them."))

    assert handle.wait(timeout=60).final_output == "They answered."
    first, second = shop.diary(handle.id)
    assert first["key"] == second["key"]


def test_an_error_that_stays_ends_the_run(run_agent: AgentTask, model: Model) -> None:
    """With its own code, what went wrong, and what a person can do about it."""
    model.will_say({"error": "response", "status": 401, "message": "wrong key"})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="locked", input_text="Hello?"))
    result = handle.wait(timeout=60)

    assert result.stop_reason is StopReason.FAILED
    assert result.error_details is not None
    assert (result.error_details.code, result.error_details.retryable) == ("llm.response", False)
    assert "wrong key" in result.error_details.message
    assert "OPENAI_API_KEY" in str(result.error_details.hint)
