"""4. A tool is what an agent can do besides talking: a function that the model may call."""

from __future__ import annotations

import json

from openagents_worker import RunArtifact, RunRequest
from openagents_worker.producer.task import AgentTask
from tests.fundamentals import shop as tools
from tests.installation import Installation, Model, call


def test_a_tool_is_a_function() -> None:
    """Name, description and parameters are those of the function; so it can be tested as one."""
    described = tools.price.build().describe()

    assert described["name"] == "price"
    assert described["description"] == "Says what an item costs, in cents."
    assert described["parameters"]["properties"] == {
        "item": {"type": "string", "description": "What is to be bought."}
    }


def test_what_a_tool_returns_is_told_to_the_model(run_agent: AgentTask, model: Model) -> None:
    """The model asks for a call; the next time it is asked itself, the result stands behind its own words."""
    model.will_say({"tool_calls": [call("price", item="melon")]}, {"text": "250 cents."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="melon", input_text="A melon?"))
    handle.wait(timeout=60)

    *_, said, heard = model.asked(handle.id)[1]["messages"]
    assert said["tool_calls"][0]["function"]["name"] == "price"
    assert (heard["role"], heard["content"]) == ("tool", "250")


def test_a_tools_error_is_told_to_the_model_too(run_agent: AgentTask, model: Model) -> None:
    """A run does not end because a tool has failed: the model reads why, and may try something else."""
    model.will_say({"tool_calls": [call("price", item="kiwi")]}, {"text": "We have no kiwis, but pears."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="kiwi", input_text="A kiwi?"))

    assert handle.wait(timeout=60).final_output == "We have no kiwis, but pears."
    assert json.loads(model.asked(handle.id)[1]["messages"][-1]["content"]) == {
        "error": "tool.permanent",
        "message": "there is no kiwi",
        "hint": "there are: apple, pear, melon",
    }


def test_arguments_are_checked_before_the_tool_runs(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """What does not fit the function's parameters is the model's mistake, and is told to it."""
    model.will_say({"tool_calls": [call("price", thing="pear")]}, {"text": "Sorry."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="thing", input_text="A thing?"))
    handle.wait(timeout=60)

    told = json.loads(model.asked(handle.id)[1]["messages"][-1]["content"])
    assert told["error"] == "tool.validation"
    assert shop.diary(handle.id) == []


def test_several_calls_of_one_turn_are_answered_together(run_agent: AgentTask, model: Model) -> None:
    """Those that are declared safe run side by side; the results come in the order of the calls."""
    items = ["melon", "apple", "pear"]
    model.will_say({"tool_calls": [call("price", item=item) for item in items]}, {"text": "320 cents."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="basket", input_text="All of it?"))
    handle.wait(timeout=60)

    results = [m["content"] for m in model.asked(handle.id)[1]["messages"] if m["role"] == "tool"]
    assert results == ["250", "30", "40"]


def test_a_tool_can_leave_an_artifact(run_agent: AgentTask, model: Model, shop: Installation) -> None:
    """Something beside the answer: it is in the run's result and stays in the session."""
    model.will_say({"tool_calls": [call("pay", cents=40)]}, {"text": "Thank you."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="paying", input_text="Here is 40."))

    receipt = RunArtifact(name="receipt", kind="text", payload="40 cents")
    assert handle.wait(timeout=60).artifacts == [receipt]
    assert shop.client.session("paying").artifacts == (receipt,)


def test_every_call_has_an_idempotency_key_of_its_own(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """The same call has the same key, however often it must be made: who gets it can recognise a repeat."""
    model.will_say(
        {"tool_calls": [call("pay", cents=1)]}, {"tool_calls": [call("pay", cents=1)]}, {"text": "!"}
    )

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="twice", input_text="One and one."))
    handle.wait(timeout=60)

    first, second = (line["key"] for line in shop.diary(handle.id))
    assert first != second
