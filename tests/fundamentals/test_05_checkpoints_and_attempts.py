"""5. A call with a checkpoint is never repeated. An attempt is one try of one worker to execute a run."""

from __future__ import annotations

from openagents_worker import RunRequest
from openagents_worker.producer.task import AgentTask
from tests.fundamentals.shop import DELIVERY_ALLOWED
from tests.support.deployment import Installation, Model, call
from tests.support.waiting import wait_for


def test_every_call_of_a_model_or_a_tool_is_a_checkpoint(run_agent: AgentTask, model: Model) -> None:
    """The outcome of the call and its changes are stored before the run continues.

    Checkpoint 0 is the prepared run, before the first call.
    """
    model.will_say({"tool_calls": [call("price", item="pear")]}, {"text": "40 cents."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="steps", input_text="A pear?"))
    saved = [event.payload for event in handle.events() if event.name == "run.checkpoint_saved"]

    assert [each["step_index"] for each in saved] == [0, 1, 2, 3]  # start, model, tool, model
    assert saved[2]["checkpoint_id"] == f"{handle.id}:step:2"


def test_another_worker_continues_the_run_of_a_killed_worker(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """The other worker starts a new attempt. It takes the outcomes of finished calls from their checkpoints,
    so no call is paid for twice. It repeats the interrupted call with the same idempotency key."""
    model.will_say(
        {"tool_calls": [call("pay", cents=250)]}, {"tool_calls": [call("deliver")]}, {"text": "Enjoy."}
    )
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="killed", input_text="A melon!"))
    wait_for(lambda: len(shop.diary(handle.id)) == 2, "the payment is made and the delivery has started")

    shop.worker.kill()
    shop.stack.start_worker("another")
    wait_for(lambda: len(shop.diary(handle.id)) == 3, "the delivery has started again")
    (shop.folder / DELIVERY_ALLOWED).touch()
    result = handle.wait(timeout=60)
    (shop.folder / DELIVERY_ALLOWED).unlink()

    paid, *started, delivered = shop.diary(handle.id)
    assert result.final_output == "Enjoy."
    assert (paid["what"], delivered["what"]) == ("paid", "delivered")
    assert len({line["key"] for line in started}) == 1
    assert len(model.asked(handle.id)) == 3  # one request per turn, as without the failure
    assert (result.usage.llm_calls, result.usage.tool_calls) == (3, 2)
    assert handle.record().attempt == 2


def test_an_attempt_names_its_checkpoint(run_agent: AgentTask, model: Model) -> None:
    """Here the model asks for a long pause. The run is suspended, and a second attempt continues it."""
    model.will_say(
        {"tool_calls": [call("price", item="pear")]},
        {"error": "rate_limit", "retry_after_ms": 3_000},
        {"text": "40 cents."},
    )

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="suspended", input_text="A pear?"))
    attempts = [event.payload for event in handle.events() if event.name == "run.attempt_started"]

    assert [each["attempt"] for each in attempts] == [1, 2]
    assert [each["checkpoint_id"] for each in attempts] == [None, f"{handle.id}:step:2"]
