"""5. A checkpoint is a call that will not be made again; an attempt is one try at a run by one worker."""

from __future__ import annotations

from openagents_worker import RunRequest
from openagents_worker.producer.task import AgentTask
from tests.fundamentals.shop import DOOR
from tests.installation import Installation, Model, call
from tests.waiting import wait_for


def test_every_call_of_a_model_or_a_tool_is_a_checkpoint(run_agent: AgentTask, model: Model) -> None:
    """Its outcome is stored together with what it has changed before the run goes on. Number 0 is the
    prepared start."""
    model.will_say({"tool_calls": [call("price", item="pear")]}, {"text": "40 cents."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="steps", input_text="A pear?"))
    saved = [event.payload for event in handle.events() if event.name == "run.checkpoint_saved"]

    assert [each["step_index"] for each in saved] == [0, 1, 2, 3]  # start, model, tool, model
    assert saved[2]["checkpoint_id"] == f"{handle.id}:step:2"


def test_a_run_whose_worker_is_killed_goes_on_with_another(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """The other one starts a new attempt. Calls with a checkpoint are answered from it: nothing is paid for
    twice. The call that was on its way is made again, with the same idempotency key."""
    model.will_say(
        {"tool_calls": [call("pay", cents=250)]}, {"tool_calls": [call("deliver")]}, {"text": "Enjoy."}
    )
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="killed", input_text="A melon!"))
    wait_for(lambda: len(shop.diary(handle.id)) == 2, "it is paid, and the courier stands at the door")

    shop.worker.kill()
    shop.stack.start_worker("another")
    wait_for(lambda: len(shop.diary(handle.id)) == 3, "a second courier stands at the door")
    (shop.folder / DOOR).touch()
    result = handle.wait(timeout=60)
    (shop.folder / DOOR).unlink()

    paid, *at_the_door, delivered = shop.diary(handle.id)
    assert result.final_output == "Enjoy."
    assert (paid["what"], delivered["what"]) == ("paid", "delivered")
    assert len({line["key"] for line in at_the_door}) == 1
    assert len(model.asked(handle.id)) == 3  # once a turn, as if nothing had happened
    assert (result.usage.llm_calls, result.usage.tool_calls) == (3, 2)
    assert handle.record().attempt == 2


def test_an_attempt_says_where_it_goes_on(run_agent: AgentTask, model: Model) -> None:
    """A run that is put aside, here because its model is away for a moment, is another attempt later."""
    model.will_say(
        {"tool_calls": [call("price", item="pear")]},
        {"error": "server_error", "times": 3},
        {"text": "40 cents."},
    )

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="aside", input_text="A pear?"))
    attempts = [event.payload for event in handle.events() if event.name == "run.attempt_started"]

    assert [each["attempt"] for each in attempts] == [1, 2]
    assert [each["checkpoint_id"] for each in attempts] == [None, f"{handle.id}:step:2"]
