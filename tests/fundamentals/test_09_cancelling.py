"""9. To cancel is to end a run from outside, wherever it is."""

from __future__ import annotations

import pytest

from openagents_worker import Client, RunFailed, RunRequest, StopReason
from openagents_worker.producer.task import AgentTask
from tests.installation import Installation, Model, call
from tests.waiting import wait_for


def test_a_running_run_is_cancelled_in_the_middle_of_its_call(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """Its tool is told, too, and can clean up; the reason stands in the run's last events."""
    model.will_say({"tool_calls": [call("deliver")]})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="changed", input_text="Bring it."))
    wait_for(lambda: shop.diary(handle.id), "the courier stands at the door")

    handle.cancel("I have changed my mind")
    *_, terminal, _final = handle.events()

    assert [line["what"] for line in shop.diary(handle.id)] == ["at the door", "sent away"]
    assert (terminal.name, terminal.payload["reason"]) == ("run.cancelled", "I have changed my mind")
    assert handle.wait(timeout=60).stop_reason is StopReason.CANCELLED


def test_a_run_that_has_not_begun_ends_at_once(run_agent: AgentTask, client: Client) -> None:
    """Nobody carries it, so nobody has to be asked. Here it was to begin in an hour."""
    request = RunRequest(agent_id="clerk", session_id="tomorrow", input_text="Wake me.")
    handle = run_agent.apply_async((request,), countdown=3600)

    handle.cancel()

    assert handle.ready()
    with pytest.raises(RunFailed) as error:
        handle.get(timeout=30)
    assert error.value.code == "run.cancelled"


def test_a_cancelled_run_leaves_its_session_as_it_was(
    run_agent: AgentTask, client: Client, model: Model, shop: Installation
) -> None:
    """No message, no artifact, no state; the next run takes its place."""
    model.will_say({"tool_calls": [call("pay", cents=40)]}, {"tool_calls": [call("deliver")]}, {"text": "?"})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="clean", input_text="A pear."))
    wait_for(lambda: len(shop.diary(handle.id)) == 2, "it is paid, and the courier stands at the door")

    handle.cancel()
    handle.wait(timeout=60)
    model.will_say({"text": "Hello."})
    run_agent.delay(RunRequest(agent_id="clerk", session_id="clean", input_text="Hello.")).wait(timeout=60)

    session = client.session("clean")
    assert [message["content"] for message in session.transcript] == ["Hello.", "Hello."]
    assert session.artifacts == ()


def test_a_run_that_is_over_stays_as_it_is(run_agent: AgentTask, model: Model) -> None:
    """Cancelling is safe at any time."""
    model.will_say({"text": "Done."})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="done", input_text="Quick!"))
    handle.wait(timeout=60)

    assert handle.cancel("too late") == "ALREADY"
    assert handle.wait(timeout=60).stop_reason is StopReason.COMPLETED
