"""3. An event is something that happened to a run. A watcher gets every event once, in order."""

from __future__ import annotations

import pytest

from openagents_worker import RunEvent, RunRequest
from openagents_worker.producer.task import AgentTask
from tests.fundamentals.shop import DELIVERY_ALLOWED
from tests.support.deployment import Installation, Model, call


def test_events_describe_a_run_from_acceptance_to_end(run_agent: AgentTask, model: Model) -> None:
    """The loop over `events()` ends when the run has ended."""
    model.will_say({"tool_calls": [call("price", item="pear")]}, {"text": "40 cents."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="a-pear", input_text="A pear?"))
    names = [event.name for event in handle.events()]

    steps = ("run.queued", "llm.called", "tool.called", "tool.succeeded", "llm.succeeded", "run.completed")
    assert [name for name in names if name in steps] == [
        "run.queued",
        "llm.called",
        "llm.succeeded",
        "tool.called",
        "tool.succeeded",
        "llm.called",
        "llm.succeeded",
        "run.completed",
    ]


def test_an_event_has_a_payload_and_an_envelope(run_agent: AgentTask, model: Model) -> None:
    """The payload depends on the event. The envelope has run, session, agent, worker, attempt and time."""
    model.will_say({"tool_calls": [call("price", item="pear")]}, {"text": "40 cents."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="two-pears", input_text="A pear?"))
    event = next(event for event in handle.events() if event.name == "tool.succeeded")

    assert (event.payload["tool_id"], event.payload["result"]) == ("price", 40)
    assert (event.run_id, event.session_id, event.agent_id) == (handle.id, "two-pears", "clerk")
    assert event.worker is not None
    assert event.attempt == 1


def test_events_can_be_read_again_from_any_number(run_agent: AgentTask, model: Model) -> None:
    """They are numbered from 1 without gaps. A watcher that has event n continues with `after=n`.

    A browser does the same with `Last-Event-ID`.
    """
    model.will_say({"text": "Hello."})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="again", input_text="Hello."))
    handle.wait(timeout=60)

    all_numbers = [event.seq for event in handle.events()]
    later_numbers = [event.seq for event in handle.events(after=5)]

    assert all_numbers == list(range(1, len(all_numbers) + 1))
    assert later_numbers == all_numbers[5:]


def test_a_watcher_gets_events_live(run_agent: AgentTask, model: Model, shop: Installation) -> None:
    """At the time when they happen. Here the run cannot end before the watcher has got an event."""
    model.will_say({"tool_calls": [call("deliver")]}, {"text": "Thank you."})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="live", input_text="Deliver it."))

    for event in handle.events():
        if event.name == "tool.called":
            (shop.folder / DELIVERY_ALLOWED).touch()
    (shop.folder / DELIVERY_ALLOWED).unlink()

    assert handle.wait(timeout=60).final_output == "Thank you."


def test_a_watcher_gets_the_reply_of_the_model_in_pieces(
    run_agent: AgentTask, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`llm.delta` is a live event: it is not stored and has no number. Later readers get the whole reply."""
    model.will_say({"text": "Apples, pears and melons."})
    seen: list[RunEvent] = []
    monkeypatch.setattr(model, "may_go_on", lambda piece: seen)  # reply only after the watcher has an event
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="words", input_text="What is there?"))

    for event in handle.events():
        seen.append(event)
    live = [event for event in seen if event.name == "llm.delta"]
    later = [event.name for event in handle.events()]

    assert {event.seq for event in live} == {None}
    assert "".join(str(event.payload["text"]) for event in live) == "Apples, pears and melons."
    assert "llm.delta" not in later


def test_a_run_ends_with_exactly_one_terminal_event(run_agent: AgentTask, model: Model) -> None:
    """`run.completed`, `run.failed` or `run.cancelled`. One more event follows it and is marked as final."""
    model.will_say({"text": "Goodbye."})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="goodbye", input_text="Goodbye."))

    *_, terminal, final = handle.events()

    assert (terminal.name, terminal.is_terminal) == ("run.completed", True)
    assert (final.name, final.final) == ("session.run.completed", True)
