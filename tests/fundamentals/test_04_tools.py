"""4. A tool is a function that the model may call."""

from __future__ import annotations

import json

from openagents_worker import RunArtifact, RunRequest
from openagents_worker.producer.task import AgentTask
from tests.fundamentals import shop as tools
from tests.support.deployment import Installation, Model, call


def test_a_tool_is_a_function() -> None:
    """Its name, description and parameters are those of the function. It can be called in unit tests."""
    described = tools.price.build().describe()

    assert described["name"] == "price"
    assert described["description"] == "Returns the price of an item in cents."
    assert described["parameters"]["properties"] == {
        "item": {"type": "string", "description": "The item to buy."}
    }


def test_the_model_gets_the_result_of_a_tool(run_agent: AgentTask, model: Model) -> None:
    """The model replies with a tool call. Its next request contains this reply, followed by the result."""
    model.will_say({"tool_calls": [call("price", item="melon")]}, {"text": "250 cents."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="melon", input_text="A melon?"))
    handle.wait(timeout=60)

    *_, reply, result = model.asked(handle.id)[1]["messages"]
    assert reply["tool_calls"][0]["function"]["name"] == "price"
    assert (result["role"], result["content"]) == ("tool", "250")


def test_the_model_gets_the_error_of_a_tool(run_agent: AgentTask, model: Model) -> None:
    """A failed tool call does not end the run. The model reads the error and may try something else."""
    model.will_say({"tool_calls": [call("price", item="kiwi")]}, {"text": "We have no kiwis, but pears."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="kiwi", input_text="A kiwi?"))

    assert handle.wait(timeout=60).final_output == "We have no kiwis, but pears."
    assert json.loads(model.asked(handle.id)[1]["messages"][-1]["content"]) == {
        "error": "tool.permanent",
        "message": "the shop does not sell kiwi",
        "hint": "it sells apple, pear, melon",
    }


def test_arguments_are_checked_before_the_tool_runs(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """If they do not fit the function's parameters, the tool is not called and the model gets an error."""
    model.will_say({"tool_calls": [call("price", thing="pear")]}, {"text": "Sorry."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="thing", input_text="A thing?"))
    handle.wait(timeout=60)

    result = json.loads(model.asked(handle.id)[1]["messages"][-1]["content"])
    assert result["error"] == "tool.validation"
    assert shop.diary(handle.id) == []


def test_the_results_of_one_turn_are_sent_together(run_agent: AgentTask, model: Model) -> None:
    """Calls of tools with `concurrency_safe` run in parallel. The results keep the order of the calls."""
    items = ["melon", "apple", "pear"]
    model.will_say({"tool_calls": [call("price", item=item) for item in items]}, {"text": "320 cents."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="basket", input_text="All of them?"))
    handle.wait(timeout=60)

    results = [m["content"] for m in model.asked(handle.id)[1]["messages"] if m["role"] == "tool"]
    assert results == ["250", "30", "40"]


def test_a_tool_can_add_an_artifact(run_agent: AgentTask, model: Model, shop: Installation) -> None:
    """An artifact is a named result beside the answer. It is in the result of the run and in the session."""
    model.will_say({"tool_calls": [call("pay", cents=40)]}, {"text": "Thank you."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="paying", input_text="Here is 40."))

    receipt = RunArtifact(name="receipt", kind="text", payload="40 cents")
    assert handle.wait(timeout=60).artifacts == [receipt]
    assert shop.client.session("paying").artifacts == (receipt,)


def test_every_call_has_an_idempotency_key_of_its_own(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """A repeated call has the same key, so that the called system can detect the duplicate."""
    model.will_say(
        {"tool_calls": [call("pay", cents=1)]}, {"tool_calls": [call("pay", cents=1)]}, {"text": "!"}
    )

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="twice", input_text="One and one."))
    handle.wait(timeout=60)

    first, second = (line["key"] for line in shop.diary(handle.id))
    assert first != second
