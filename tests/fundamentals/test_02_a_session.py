"""2. A session is a conversation. At most one of its runs is executed at a time."""

from __future__ import annotations

from openagents_worker import Client, RunRequest, RunState
from openagents_worker.producer.task import AgentTask
from tests.fundamentals.shop import DELIVERY_ALLOWED
from tests.support.deployment import Installation, Model, call
from tests.support.waiting import wait_for


def test_a_run_sees_the_earlier_messages_of_its_session(run_agent: AgentTask, model: Model) -> None:
    """The model gets the conversation so far, followed by the new input."""
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


def test_a_run_adds_two_messages_to_its_session(run_agent: AgentTask, client: Client, model: Model) -> None:
    """A question and an answer. Both are written, atomically, when the run completes.

    The answer also contains the tool calls of the run and their results. Later runs see them, too.
    """
    model.will_say({"tool_calls": [call("price", item="apple")]}, {"text": "30 cents."})
    run_agent.delay(RunRequest(agent_id="clerk", session_id="asking", input_text="An apple?")).wait(60)

    question, answer = client.session("asking").transcript

    assert (question["role"], question["content"]) == ("user", "An apple?")
    assert (answer["role"], answer["content"]) == ("assistant", "30 cents.")
    tool_call, tool_result = answer["tool_messages"]
    assert tool_call["tool_calls"][0]["name"] == "price"
    assert tool_result["tool_call_id"] == tool_call["tool_calls"][0]["id"]


def test_a_failed_run_adds_nothing_to_the_conversation(
    run_agent: AgentTask, client: Client, model: Model
) -> None:
    """A message that the provider has rejected is not sent again with the next question."""
    model.will_say({"error": "response"})
    failed = run_agent.delay(RunRequest(agent_id="clerk", session_id="rejected", input_text="Something bad."))
    failed.wait(timeout=60)
    model.will_say({"text": "Hello."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="rejected", input_text="Hello?"))
    handle.wait(timeout=60)

    _system, *shown = model.asked(handle.id)[0]["messages"]
    assert [message["content"] for message in shown] == ["Hello?"]
    assert [message["run_id"] for message in client.session("rejected").transcript] == [handle.id] * 2
    assert failed.record().state is RunState.FAILED


def test_runs_of_a_session_are_executed_in_the_order_of_submission(
    run_agent: AgentTask, client: Client, model: Model, shop: Installation
) -> None:
    """A waiting run occupies no worker slot. It starts when the run before it has ended."""
    model.will_say({"tool_calls": [call("deliver")]}, {"text": "Here you are."})
    runs = [
        run_agent.delay(RunRequest(agent_id="clerk", session_id="queue", input_text=f"Order {number}"))
        for number in range(3)
    ]
    wait_for(lambda: shop.diary(runs[0].id), "the first delivery has started")

    states = [run.record().state for run in runs]
    (shop.folder / DELIVERY_ALLOWED).touch()
    for run in runs:
        run.wait(timeout=60)
    (shop.folder / DELIVERY_ALLOWED).unlink()

    assert states == [RunState.RUNNING, RunState.WAITING_SESSION, RunState.WAITING_SESSION]
    messages = client.session("queue").transcript
    questions = [message["content"] for message in messages if message["role"] == "user"]
    assert questions == ["Order 0", "Order 1", "Order 2"]


def test_runs_of_different_sessions_are_executed_at_the_same_time(
    run_agent: AgentTask, model: Model, shop: Installation
) -> None:
    """One worker process executes hundreds of runs, because a run that waits for a model or a tool costs
    almost nothing."""
    model.will_say({"tool_calls": [call("deliver")]}, {"text": "Here you are."})
    runs = [
        run_agent.delay(RunRequest(agent_id="clerk", session_id=f"house-{n}", input_text="!"))
        for n in range(20)
    ]

    wait_for(lambda: all(shop.diary(run.id) for run in runs), "all deliveries have started")
    (shop.folder / DELIVERY_ALLOWED).touch()
    outputs = {run.wait(timeout=60).final_output for run in runs}
    (shop.folder / DELIVERY_ALLOWED).unlink()

    assert outputs == {"Here you are."}
