"""8. A failure is either temporary or permanent. The field `retryable` of the error says which."""

from __future__ import annotations

from openagents_worker import RunRequest, StopReason
from openagents_worker.producer.task import AgentTask
from tests.support.deployment import Installation, Model, call


def test_a_request_to_a_busy_model_is_repeated(run_agent: AgentTask, model: Model) -> None:
    """A few times within the same attempt, and not earlier than the provider allows."""
    model.will_say({"error": "rate_limit", "retry_after_ms": 50}, {"text": "Here I am."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="busy", input_text="Hello?"))
    result = handle.wait(timeout=60)

    assert result.final_output == "Here I am."
    assert result.usage.llm_retry_count == 1
    assert handle.record().attempt == 1


def test_a_run_waits_while_the_model_stays_busy(run_agent: AgentTask, model: Model) -> None:
    """It is suspended and occupies no worker slot until its retry is due. Then a new attempt continues.

    `OPENAGENTS_RETRY_AFTER_MAX_MS` limits how much of the provider's pause counts.
    """
    model.will_say({"error": "rate_limit", "retry_after_ms": 3_000}, {"text": "Here I am."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="busier", input_text="Hello?"))
    names = [event.name for event in handle.events()]

    assert "run.retry_scheduled" in names
    assert handle.wait(timeout=60).final_output == "Here I am."
    assert handle.record().attempt == 2


def test_a_retryable_error_of_a_tool_repeats_the_call_later(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """`ToolUnavailableError` is retryable. A `PermanentToolError` is a result that the model gets."""
    model.will_say({"tool_calls": [call("ring")]}, {"text": "They answered."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="ring", input_text="Call them."))

    assert handle.wait(timeout=60).final_output == "They answered."
    first, second = shop.diary(handle.id)
    assert first["key"] == second["key"]


def test_a_permanent_error_ends_the_run(run_agent: AgentTask, model: Model) -> None:
    """The result contains its code, a message, and a hint about what to do."""
    model.will_say({"error": "response", "status": 401, "message": "wrong key"})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="locked", input_text="Hello?"))
    result = handle.wait(timeout=60)

    assert result.stop_reason is StopReason.FAILED
    assert result.error_details is not None
    assert (result.error_details.code, result.error_details.retryable) == ("llm.auth", False)
    assert "wrong key" in result.error_details.message
    assert "OPENAI_API_KEY" in str(result.error_details.hint)
