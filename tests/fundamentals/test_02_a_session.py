"""2. A session is a conversation: what its runs have said, and at most one run at a time."""

from __future__ import annotations

from openagents_worker import Client, RunRequest, RunState
from openagents_worker.producer.task import AgentTask
from tests.fundamentals.shop import DOOR
from tests.installation import Installation, Model, call
from tests.waiting import wait_for


def test_a_run_sees_what_was_said_before_in_its_session(run_agent: AgentTask, model: Model) -> None:
    """The model is shown the conversation so far, then the new input."""
    model.will_say({"text": "Hello Ann."})
    run_agent.delay(RunRequest(agent_id="clerk", session_id="visit", input_text="I am Ann.")).wait(60)
    model.will_say({"text": "Ann."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="visit", input_text="Who am I?"))
    handle.wait(timeout=60)

    _system, *shown = model.asked(handle.id)[0]["messages"]
    assert [(message["role"], message["content"]) for message in shown] == [
        ("user", "I am Ann."),
        ("assistant", "Hello Ann."),
        ("user", "Who am I?"),
    ]


def test_a_session_is_two_entries_a_run(run_agent: AgentTask, client: Client, model: Model) -> None:
    """They are written when the run completes, both or neither. What it asked of tools on the way, and what
    they said, stands in the second one: later runs are shown it, too."""
    model.will_say({"tool_calls": [call("price", item="apple")]}, {"text": "30 cents."})
    run_agent.delay(RunRequest(agent_id="clerk", session_id="asking", input_text="An apple?")).wait(60)

    question, answer = client.session("asking").transcript

    assert (question["role"], question["content"]) == ("user", "An apple?")
    assert (answer["role"], answer["content"]) == ("assistant", "30 cents.")
    asked, said = answer["tool_messages"]
    assert asked["tool_calls"][0]["name"] == "price"
    assert said["tool_call_id"] == asked["tool_calls"][0]["id"]


def test_a_run_that_fails_leaves_nothing_in_the_conversation(
    run_agent: AgentTask, client: Client, model: Model
) -> None:
    """What a provider has refused once is not sent again with the next question."""
    model.will_say({"error": "response"})
    refused = run_agent.delay(RunRequest(agent_id="clerk", session_id="refused", input_text="Something bad."))
    refused.wait(timeout=60)
    model.will_say({"text": "Hello."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="refused", input_text="Hello?"))
    handle.wait(timeout=60)

    _system, *shown = model.asked(handle.id)[0]["messages"]
    assert [message["content"] for message in shown] == ["Hello?"]
    assert [message["run_id"] for message in client.session("refused").transcript] == [handle.id] * 2
    assert refused.record().state is RunState.FAILED


def test_runs_of_a_session_work_one_after_another_in_the_order_of_their_submission(
    run_agent: AgentTask, client: Client, model: Model, shop: Installation
) -> None:
    """A run that waits for its turn holds no worker; it starts when the one before it has ended."""
    model.will_say({"tool_calls": [call("deliver")]}, {"text": "Here you are."})
    runs = [
        run_agent.delay(RunRequest(agent_id="clerk", session_id="queue", input_text=f"Order {number}"))
        for number in range(3)
    ]
    wait_for(lambda: shop.diary(runs[0].id), "the first stands at the door")

    states = [run.record().state for run in runs]
    (shop.folder / DOOR).touch()
    for run in runs:
        run.wait(timeout=60)
    (shop.folder / DOOR).unlink()

    assert states == [RunState.RUNNING, RunState.WAITING_SESSION, RunState.WAITING_SESSION]
    said = [message["content"] for message in client.session("queue").transcript if message["role"] == "user"]
    assert said == ["Order 0", "Order 1", "Order 2"]


def test_runs_of_different_sessions_work_at_the_same_time(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """One worker process carries hundreds of them: a run that waits for a model or a tool costs next to
    nothing."""
    model.will_say({"tool_calls": [call("deliver")]}, {"text": "Here you are."})
    runs = [
        run_agent.delay(RunRequest(agent_id="clerk", session_id=f"house-{n}", input_text="!"))
        for n in range(20)
    ]

    wait_for(lambda: all(shop.diary(run.id) for run in runs), "all stand at their doors at once")
    (shop.folder / DOOR).touch()
    outputs = {run.wait(timeout=60).final_output for run in runs}
    (shop.folder / DOOR).unlink()

    assert outputs == {"Here you are."}
