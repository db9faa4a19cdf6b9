"""10. With an output type, the answer of a run is an object of a class and not text."""

from __future__ import annotations

import json

from pydantic import BaseModel

from openagents_worker import RunHandle, RunRequest
from openagents_worker.producer.task import AgentTask
from tests.support.deployment import Model


class Offer(BaseModel):
    item: str
    cents: int
    note: str | None = None


def offer_request(session_id: str) -> RunRequest:
    return RunRequest(agent_id="clerk", session_id=session_id, input_text="A pear?", output_type=Offer)


def test_the_answer_is_an_instance_of_the_output_type(run_agent: AgentTask, model: Model) -> None:
    """The class exists only in the producer. The worker and the model get its JSON Schema."""
    model.will_say({"text": '{"item": "pear", "cents": 40}'})

    handle: RunHandle[Offer] = run_agent.delay(offer_request("offer"))
    result = handle.wait(timeout=60)

    assert result.final_output == Offer(item="pear", cents=40)
    assert handle.get(timeout=30)["final_output"] == {"item": "pear", "cents": 40}
    system = model.asked(handle.id)[0]["messages"][0]["content"]
    assert json.dumps(Offer.model_json_schema(), separators=(",", ":")) in system


def test_the_model_gets_the_errors_of_its_answer(run_agent: AgentTask, model: Model) -> None:
    """The model tries again in the same conversation, three times unless the budget sets another number.

    Then the run fails. An answer of the wrong form never becomes a result.
    """
    model.will_say({"text": '{"item": "pear"}'})

    handle: RunHandle[Offer] = run_agent.delay(offer_request("again"))
    result = handle.wait(timeout=60)

    assert result.final_output is None
    assert result.error_details is not None
    assert result.error_details.code == "execution.output_validation"
    requests = model.asked(handle.id)
    assert len(requests) == 4
    *_, answer, correction = requests[1]["messages"]
    assert (answer["role"], answer["content"]) == ("assistant", '{"item": "pear"}')
    assert correction["role"] == "user"
    assert "field 'cents' is missing" in correction["content"]
