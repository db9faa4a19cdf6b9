"""1. A run is one request to an agent. A worker executes it to its end."""

from __future__ import annotations

import pytest

from openagents_worker import Client, RunFailed, RunRequest, RunState, StopReason
from openagents_worker.errors import RunNotFound
from openagents_worker.producer.task import AgentTask
from tests.support.deployment import Model


def test_a_producer_submits_a_request_and_waits_for_its_result(run_agent: AgentTask, model: Model) -> None:
    """A producer needs this library and the URL of Redis. It needs no agents, no tools and no API keys."""
    model.will_say({"text": "We are open until six."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="ann", input_text="Are you open?"))
    result = handle.wait(timeout=60)

    assert result.final_output == "We are open until six."
    assert result.stop_reason is StopReason.COMPLETED


def test_a_request_may_be_a_dict_of_its_fields(run_agent: AgentTask, model: Model) -> None:
    """Three fields are required. `get` returns the result as JSON, like any result of a Celery task."""
    model.will_say({"text": "Good morning."})

    handle = run_agent.delay({"agent_id": "clerk", "session_id": "bob", "input_text": "Good morning."})

    assert handle.get(timeout=30)["final_output"] == "Good morning."


def test_any_process_can_read_a_run_by_its_id(run_agent: AgentTask, client: Client, model: Model) -> None:
    """A producer needs to keep only the id. The record of the run stays in Redis for days after its end."""
    model.will_say({"text": "Good morning."})
    request = RunRequest(agent_id="clerk", session_id="cem", input_text="Good morning.")
    run_agent.delay(request).wait(timeout=60)

    record = client.record(request.run_id)

    assert record.state is RunState.COMPLETED
    assert record.request == request
    assert record.result is not None
    assert record.result.final_output == "Good morning."


def test_the_same_request_twice_is_one_run(run_agent: AgentTask, model: Model) -> None:
    """A request with your own `run_id` can be submitted again if you do not know whether it was accepted."""
    model.will_say({"text": "Good morning."})
    request = RunRequest(agent_id="clerk", session_id="dan", run_id="dan-1", input_text="Good morning.")

    first = run_agent.delay(request)
    second = run_agent.delay(request)

    assert first.wait(timeout=60) == second.wait(timeout=60)
    assert len(model.asked("dan-1")) == 1


def test_a_failed_run_has_a_result_too(run_agent: AgentTask, model: Model) -> None:
    """`wait` returns it, with the code, the message and the hint of the error. `get` raises the error."""
    model.will_say({"error": "response", "message": "I do not speak this language."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="eve", input_text="…"))
    result = handle.wait(timeout=60)

    assert result.stop_reason is StopReason.FAILED
    assert result.error_details is not None
    assert result.error_details.code == "llm.response"
    with pytest.raises(RunFailed, match="I do not speak this language") as error:
        handle.get(timeout=30)
    assert error.value.code == "llm.response"


def test_an_unknown_run_id_is_an_error(client: Client) -> None:
    """Celery itself would wait for the result forever."""
    with pytest.raises(RunNotFound):
        client.handle("no-such-run").wait(timeout=60)


def test_a_result_contains_the_usage_of_the_run(run_agent: AgentTask, model: Model) -> None:
    """The tokens as counted by the provider, and their cost if the prices are known."""
    model.will_say({"text": "Good morning.", "usage": {"input_tokens": 1000, "output_tokens": 100}})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="fay", input_text="Good morning."))
    usage = handle.wait(timeout=60).usage

    assert (usage.llm_calls, usage.input_tokens, usage.output_tokens) == (1, 1000, 100)
    assert usage.cost_usd == pytest.approx(
        0.002
    )  # 1 dollar per million input tokens, 10 per million output tokens
