"""6. A memory decides how much of a session later runs see, and what else it stores for them."""

from __future__ import annotations

from openagents_worker import Client, RunRequest
from openagents_worker.producer.task import AgentTask
from tests.support.deployment import Model


def visit(run_agent: AgentTask, session_id: str, text: str) -> str:
    handle = run_agent.delay(RunRequest(agent_id="regular", session_id=session_id, input_text=text))
    handle.wait(timeout=60)
    return str(handle.id)


def test_the_model_gets_the_conversation_once(run_agent: AgentTask, model: Model) -> None:
    """As messages. The requests of later turns begin with the same messages, so a provider can cache them."""
    model.will_say({"text": "Noted."})
    first_id = visit(run_agent, "shown", "I like pears.")

    run_id = visit(run_agent, "shown", "What do I like?")

    shown = model.asked(run_id)[0]["messages"]
    assert str(shown).count("I like pears.") == 1
    assert shown[:2] == model.asked(first_id)[0]["messages"]


def test_a_window_buffer_keeps_the_newest_turns(run_agent: AgentTask, model: Model) -> None:
    """With `window_size` 2, the model gets the last two turns and then the new question."""
    model.will_say({"text": "Noted."})
    for text in ("One.", "Two.", "Three."):
        visit(run_agent, "window", text)

    run_id = visit(run_agent, "window", "Four.")

    shown = [
        message["content"] for message in model.asked(run_id)[0]["messages"] if message["role"] == "user"
    ]
    assert shown == ["Two.", "Three.", "Four."]


def test_a_failed_run_does_not_change_the_memory(run_agent: AgentTask, client: Client, model: Model) -> None:
    """The changes of a run to its session are stored when it completes. Otherwise they are dropped."""
    model.will_say({"error": "response"})

    visit(run_agent, "failing", "Remember this.")

    assert client.session("failing").state == {}
