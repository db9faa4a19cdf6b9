"""11. A run can wait for a value from outside, or for a time. It is parked: no worker holds a slot for it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from openagents_worker import Client, RunConflict, RunNotFound, RunRequest
from openagents_worker.errors import RequestInvalid, RequestTooLarge
from openagents_worker.models import RunState
from openagents_worker.producer.task import AgentTask
from tests.support.deployment import Installation, Model, call, story
from tests.support.waiting import wait_for


def test_a_value_that_is_sent_to_the_run_wakes_it(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """`context.receive` of a pattern or a tool returns the value. The record says what the run waits for."""
    model.will_say(
        {"tool_calls": [call("pay", cents=250)]},
        {"tool_calls": [call("ask_the_customer", question="Which melon?")]},
        {"text": "Enjoy."},
    )
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="asked", input_text="A melon!"))
    wait_for(lambda: handle.record().state is RunState.WAITING, "the run is parked")
    [waiting] = handle.record().waiting
    assert (waiting.kind, waiting.name, waiting.until) == ("signal", "answer", None)
    assert (handle.record().worker, handle.state) == (None, "RETRY")

    handle.send("answer", {"melon": "the green one"}, message_id="m1")

    assert handle.wait(timeout=60).final_output == "Enjoy."
    told = [message["content"] for message in model.asked(handle.id)[-1]["messages"]]
    assert any("the green one" in str(content) for content in told)
    assert [line["what"] for line in shop.diary(handle.id)] == ["paid", "asked", "asked"]
    assert [event.name for event in story(handle) if event.name in WAITING_EVENTS] == WAITING_EVENTS
    with pytest.raises(RunConflict, match="is over"):
        handle.send("answer", "too late")


WAITING_EVENTS = ["run.waiting", "run.woken", "signal.received"]


def test_a_value_that_is_sent_early_is_kept(run_agent: AgentTask, model: Model) -> None:
    """Here it is sent before the run begins. A message id that was sent before does not count again."""
    model.will_say({"tool_calls": [call("ask_the_customer", question="Now?")]}, {"text": "Enjoy."})

    handle = run_agent.apply_async(
        args=[RunRequest(agent_id="clerk", session_id="early", input_text="A pear!")], countdown=0.2
    )
    handle.send("answer", "yes", message_id="m1")
    handle.send("answer", "yes", message_id="m1")

    assert handle.wait(timeout=60).final_output == "Enjoy."
    assert "run.waiting" not in [event.name for event in handle.events()]


def test_a_wait_survives_its_worker(run_agent: AgentTask, model: Model, shop: Installation) -> None:
    """The worker that parked the run is killed; another one continues it when its value comes."""
    model.will_say({"tool_calls": [call("ask_the_customer", question="Still here?")]}, {"text": "Enjoy."})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="outlived", input_text="A pear!"))
    wait_for(lambda: handle.record().state is RunState.WAITING, "the run is parked")

    for worker in list(shop.stack.workers):
        worker.kill()
    shop.stack.start_worker("successor")
    handle.send("answer", "yes")

    assert handle.wait(timeout=60).final_output == "Enjoy."
    assert handle.record().recoveries == 0


def test_a_run_sleeps_for_as_long_as_it_wants(run_agent: AgentTask, model: Model) -> None:
    """Its record has the time. A sleep of less than a second does not park the run."""
    model.will_say({"tool_calls": [call("wait_for_the_bank", hours=24 * 365)]})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="sleeping", input_text="A pear!"))
    wait_for(lambda: handle.record().state is RunState.WAITING, "the run is parked")
    [waiting] = handle.record().waiting
    assert waiting.until is not None
    assert waiting.until - datetime.now(UTC) > timedelta(days=364)

    assert handle.cancel("the bank has closed") == "CANCELLED"

    model.will_say({"tool_calls": [call("wait_for_the_bank", hours=0.00001)]}, {"text": "Enjoy."})
    short = run_agent.delay(RunRequest(agent_id="clerk", session_id="sleeping", input_text="A pear!"))
    assert short.wait(timeout=60).final_output == "Enjoy."
    assert short.record().attempt == 1


def test_a_sleep_of_seconds_parks_and_wakes(run_agent: AgentTask, model: Model, shop: Installation) -> None:
    """The time is counted from where the call began to wait."""
    model.will_say({"tool_calls": [call("wait_for_the_bank", hours=1.5 / 3600)]}, {"text": "Enjoy."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="napping", input_text="A pear!"))

    assert handle.wait(timeout=60).final_output == "Enjoy."
    assert handle.record().attempt == 2
    assert [line["what"] for line in shop.diary(handle.id)] == ["booked"]


def test_what_cannot_be_sent_is_refused_where_it_is_sent(run_agent: AgentTask, client: Client) -> None:
    with pytest.raises(RunNotFound):
        client.send("no-such-run", "answer", 1)
    with pytest.raises(RequestInvalid, match="the name of a signal must have"):
        client.send("r", "two words", 1)
    with pytest.raises(RequestInvalid, match="message_id must have"):
        client.send("r", "answer", 1, message_id="")
    with pytest.raises(RequestInvalid, match="must be JSON"):
        client.send("r", "answer", object())  # type: ignore[arg-type]
    with pytest.raises(RequestTooLarge, match="1,048,576 are allowed"):
        client.send("r", "answer", "x" * 2**20)
