"""12. A user sends a message before the last one is answered, or wants to go back."""

from __future__ import annotations

import pytest

from openagents_worker import Client, RunRequest, RunState
from openagents_worker.producer.task import AgentTask
from tests.fundamentals.shop import DELIVERY_ALLOWED
from tests.support.deployment import Installation, Model, call
from tests.support.waiting import wait_for


def order(session_id: str, text: str, **fields: str) -> RunRequest:
    return RunRequest(agent_id="clerk", session_id=session_id, input_text=text, **fields)


@pytest.mark.parametrize("on_busy", ["interrupt", "rollback"])
def test_a_new_message_ends_the_run_that_works(
    run_agent: AgentTask, client: Client, model: Model, shop: Installation, on_busy: str
) -> None:
    """The next run begins at once. What it sees of the first one is its own choice."""
    model.will_say({"tool_calls": [call("deliver")]})
    first = run_agent.delay(order(on_busy, "Deliver apples."))
    wait_for(lambda: shop.diary(first.id), "the delivery has started")
    model.will_say({"text": "Pears, then."})

    second = run_agent.delay(order(on_busy, "No, pears!", on_busy=on_busy))

    assert second.wait(timeout=60).final_output == "Pears, then."
    assert first.record().state is RunState.CANCELLED
    assert [entry["what"] for entry in shop.diary(first.id)] == ["delivery started", "delivery cancelled"]
    _system, *shown = model.asked(second.id)[0]["messages"]
    roles = [message["role"] for message in shown]
    if on_busy == "rollback":
        assert roles == ["user"]
    else:
        assert roles == ["user", "assistant", "tool", "assistant", "user"]
        assert "interrupted" in shown[2]["content"]


def test_a_message_can_be_put_into_a_run(run_agent: AgentTask, model: Model, shop: Installation) -> None:
    """The run goes on, and the model sees the message in its next call, or in one more."""
    delivered = {"text": "Delivered, with a card."}
    model.will_say({"tool_calls": [call("deliver")]}, delivered, delivered)
    handle = run_agent.delay(order("card", "Deliver apples."))
    wait_for(lambda: shop.diary(handle.id), "the delivery has started")

    handle.steer("With a card, please.", by="ann")
    (shop.folder / DELIVERY_ALLOWED).touch()
    handle.wait(timeout=60)
    (shop.folder / DELIVERY_ALLOWED).unlink()

    shown = model.asked(handle.id)[-1]["messages"]
    assert (shown[-1]["role"], shown[-1]["content"]) == ("user", "With a card, please.")
    steered = [event.payload for event in handle.events() if event.name == "run.steered"]
    assert steered == [{"text": "With a card, please.", "by": "ann"}]


def test_a_run_can_go_on_from_a_step_of_another_one(
    run_agent: AgentTask, client: Client, model: Model, shop: Installation
) -> None:
    """Nothing before that step is executed again, also if the question is another one."""
    model.will_say({"tool_calls": [call("price", item="apple")]}, {"text": "30 cents."})
    first = run_agent.delay(order("prices", "How much is an apple?"))
    first.wait(timeout=60)
    model.will_say({"text": "(the first turn is not asked again)"}, {"text": "Three apples are 90 cents."})

    fork = first.fork(f"{first.id}:step:2", input_text="How much are three apples?")

    assert fork.wait(timeout=60).final_output == "Three apples are 90 cents."
    assert len(shop.diary(first.id)) == 1
    assert not shop.diary(fork.id)
    assert fork.record().session_id != "prices"
    assert len(client.session("prices").transcript) == 2
