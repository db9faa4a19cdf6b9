"""9. A run can be cancelled at any time, from any process."""

from __future__ import annotations

import pytest

from openagents_worker import Client, RunFailed, RunRequest, StopReason
from openagents_worker.producer.task import AgentTask
from tests.support.deployment import Installation, Model, call
from tests.support.waiting import wait_for


def test_cancelling_a_running_run_cancels_its_current_call(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """The tool gets a `CancelledError` and can clean up. The terminal event contains the reason."""
    model.will_say({"tool_calls": [call("deliver")]})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="changed", input_text="Deliver it."))
    wait_for(lambda: shop.diary(handle.id), "the delivery has started")

    handle.cancel("I have changed my mind")
    *_, terminal, _final = handle.events()

    assert [line["what"] for line in shop.diary(handle.id)] == ["delivery started", "delivery cancelled"]
    assert (terminal.name, terminal.payload["reason"]) == ("run.cancelled", "I have changed my mind")
    assert handle.wait(timeout=60).stop_reason is StopReason.CANCELLED


def test_cancelling_a_run_that_has_not_started_ends_it_at_once(run_agent: AgentTask, client: Client) -> None:
    """No worker executes it, so the producer ends it. Here the run would have started in an hour."""
    request = RunRequest(agent_id="clerk", session_id="tomorrow", input_text="Wake me.")
    handle = run_agent.apply_async((request,), countdown=3600)

    handle.cancel()

    assert handle.ready()
    with pytest.raises(RunFailed) as error:
        handle.get(timeout=30)
    assert error.value.code == "run.cancelled"


def test_a_cancelled_run_does_not_change_its_session(
    run_agent: AgentTask, client: Client, model: Model, shop: Installation
) -> None:
    """It adds no messages, artifacts or state. The next run of the session can start."""
    model.will_say({"tool_calls": [call("pay", cents=40)]}, {"tool_calls": [call("deliver")]}, {"text": "?"})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="clean", input_text="A pear."))
    wait_for(lambda: len(shop.diary(handle.id)) == 2, "the payment is made and the delivery has started")

    handle.cancel()
    handle.wait(timeout=60)
    model.will_say({"text": "Hello."})
    run_agent.delay(RunRequest(agent_id="clerk", session_id="clean", input_text="Hello.")).wait(timeout=60)

    session = client.session("clean")
    assert [message["content"] for message in session.transcript] == ["Hello.", "Hello."]
    assert session.artifacts == ()


def test_cancelling_a_run_that_has_ended_changes_nothing(run_agent: AgentTask, model: Model) -> None:
    """So it is safe to cancel at any time."""
    model.will_say({"text": "Done."})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="done", input_text="Quick!"))
    handle.wait(timeout=60)

    assert handle.cancel("too late") == "ALREADY"
    assert handle.wait(timeout=60).stop_reason is StopReason.COMPLETED
