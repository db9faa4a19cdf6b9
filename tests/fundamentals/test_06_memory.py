"""6. A memory is what a session keeps for later runs besides the conversation itself."""

from __future__ import annotations

from openagents_worker import Client, RunRequest
from openagents_worker.producer.task import AgentTask
from tests.installation import Model


def visit(run_agent: AgentTask, session_id: str, text: str) -> str:
    handle = run_agent.delay(RunRequest(agent_id="regular", session_id=session_id, input_text=text))
    handle.wait(timeout=30)
    return str(handle.id)


def test_a_memory_is_shown_to_the_model(run_agent: AgentTask, model: Model) -> None:
    """What it holds stands in the system message; this one holds the latest turns of the session."""
    model.will_say({"text": "Noted."})
    visit(run_agent, "shown", "I like pears.")

    run_id = visit(run_agent, "shown", "What do I like?")

    system = model.asked(run_id)[0]["messages"][0]["content"]
    assert "## history" in system
    assert "I like pears." in system


def test_a_window_forgets_what_is_older(run_agent: AgentTask, model: Model) -> None:
    """Of the kind `window_buffer`, with `window_size` 2."""
    model.will_say({"text": "Noted."})
    for text in ("One.", "Two.", "Three."):
        visit(run_agent, "window", text)

    run_id = visit(run_agent, "window", "Four.")

    memory = model.asked(run_id)[0]["messages"][0]["content"].partition("## history")[2]
    assert ["One." in memory, "Two." in memory, "Three." in memory] == [False, True, True]


def test_a_run_that_fails_leaves_no_memory(run_agent: AgentTask, client: Client, model: Model) -> None:
    """What a run changes in its session counts from its end on, and only if it has completed."""
    model.will_say({"error": "response"})

    visit(run_agent, "failing", "Remember this.")

    assert client.session("failing").state == {}
