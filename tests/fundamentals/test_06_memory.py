"""6. A memory is what a session keeps for later runs: how much of the conversation, and what besides it."""

from __future__ import annotations

from openagents_worker import Client, RunRequest
from openagents_worker.producer.task import AgentTask
from tests.installation import Model


def visit(run_agent: AgentTask, session_id: str, text: str) -> str:
    handle = run_agent.delay(RunRequest(agent_id="regular", session_id=session_id, input_text=text))
    handle.wait(timeout=60)
    return str(handle.id)


def test_a_conversation_is_shown_to_the_model_once(run_agent: AgentTask, model: Model) -> None:
    """As messages. The system message is the same in every turn: the provider caches what comes after it."""
    model.will_say({"text": "Noted."})
    first_id = visit(run_agent, "shown", "I like pears.")

    run_id = visit(run_agent, "shown", "What do I like?")

    shown = model.asked(run_id)[0]["messages"]
    assert str(shown).count("I like pears.") == 1
    assert shown[:2] == model.asked(first_id)[0]["messages"]


def test_a_window_forgets_what_is_older(run_agent: AgentTask, model: Model) -> None:
    """Of the kind `window_buffer`, with `window_size` 2: the model is shown two turns, then the question."""
    model.will_say({"text": "Noted."})
    for text in ("One.", "Two.", "Three."):
        visit(run_agent, "window", text)

    run_id = visit(run_agent, "window", "Four.")

    shown = [
        message["content"] for message in model.asked(run_id)[0]["messages"] if message["role"] == "user"
    ]
    assert shown == ["Two.", "Three.", "Four."]


def test_a_run_that_fails_leaves_no_memory(run_agent: AgentTask, client: Client, model: Model) -> None:
    """What a run changes in its session counts from its end on, and only if it has completed."""
    model.will_say({"error": "response"})

    visit(run_agent, "failing", "Remember this.")

    assert client.session("failing").state == {}
