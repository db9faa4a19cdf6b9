"""10. An output type is what a run's answer has to fit: the producer gets values, not prose."""

from __future__ import annotations

import json

from pydantic import BaseModel

from openagents_worker import RunHandle, RunRequest
from openagents_worker.producer.task import AgentTask
from tests.installation import Model


class Offer(BaseModel):
    item: str
    cents: int
    note: str | None = None


def asking(session_id: str) -> RunRequest:
    return RunRequest(agent_id="clerk", session_id=session_id, input_text="A pear?", output_type=Offer)


def test_an_answer_is_an_instance_of_the_class_that_was_asked_for(run_agent: AgentTask, model: Model) -> None:
    """The class stays with the producer; what travels is its JSON Schema, and the model is told of it."""
    model.will_say({"text": '{"item": "pear", "cents": 40}'})

    handle: RunHandle[Offer] = run_agent.delay(asking("offer"))
    result = handle.wait(timeout=60)

    assert result.final_output == Offer(item="pear", cents=40)
    assert handle.get(timeout=30)["final_output"] == {"item": "pear", "cents": 40}
    system = model.asked(handle.id)[0]["messages"][0]["content"]
    assert json.dumps(Offer.model_json_schema(), separators=(",", ":")) in system


def test_the_model_is_told_what_is_wrong_with_its_answer(run_agent: AgentTask, model: Model) -> None:
    """It tries again in the same conversation, three times unless the budget says otherwise; then the run has
    failed, and nobody has to guess what prose meant."""
    model.will_say({"text": '{"item": "pear"}'})

    handle: RunHandle[Offer] = run_agent.delay(asking("again"))
    result = handle.wait(timeout=60)

    assert result.final_output is None
    assert result.error_details is not None
    assert result.error_details.code == "execution.output_validation"
    asked = model.asked(handle.id)
    assert len(asked) == 4
    *_, said, told = asked[1]["messages"]
    assert (said["role"], said["content"]) == ("assistant", '{"item": "pear"}')
    assert told["role"] == "user"
    assert "field 'cents' is missing" in told["content"]
