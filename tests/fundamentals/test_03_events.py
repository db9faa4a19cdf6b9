"""3. An event is something that happened to a run. Whoever watches sees all of them, in order, once."""

from __future__ import annotations

import pytest

from openagents_worker import RunEvent, RunRequest
from openagents_worker.producer.task import AgentTask
from tests.fundamentals.shop import DOOR
from tests.installation import Installation, Model, call


def test_a_runs_events_tell_its_story(run_agent: AgentTask, model: Model) -> None:
    """From its acceptance to its end. The loop ends with the run."""
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


def test_an_event_says_what_when_and_who(run_agent: AgentTask, model: Model) -> None:
    """Its payload is what it is about; run, session, agent, worker, attempt and time stand around it."""
    model.will_say({"tool_calls": [call("price", item="pear")]}, {"text": "40 cents."})

    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="two-pears", input_text="A pear?"))
    event = next(event for event in handle.events() if event.name == "tool.succeeded")

    assert (event.payload["tool_id"], event.payload["result"]) == ("price", 40)
    assert (event.run_id, event.session_id, event.agent_id) == (handle.id, "two-pears", "clerk")
    assert event.worker is not None
    assert event.attempt == 1


def test_events_can_be_read_again_and_from_any_place(run_agent: AgentTask, model: Model) -> None:
    """They are numbered from 1 without gaps. Whoever has seen number n goes on after it, as a browser does
    with `Last-Event-ID`."""
    model.will_say({"text": "Hello."})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="again", input_text="Hello."))
    handle.wait(timeout=60)

    everything = [event.seq for event in handle.events()]
    the_rest = [event.seq for event in handle.events(after=5)]

    assert everything == list(range(1, len(everything) + 1))
    assert the_rest == everything[5:]


def test_watching_is_live(run_agent: AgentTask, model: Model, shop: Installation) -> None:
    """An event is seen when it happens, not when the run is over: here the watcher opens the door."""
    model.will_say({"tool_calls": [call("deliver")]}, {"text": "Thank you."})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="door", input_text="Bring it."))

    for event in handle.events():
        if event.name == "tool.called":
            (shop.folder / DOOR).touch()
    (shop.folder / DOOR).unlink()

    assert handle.wait(timeout=60).final_output == "Thank you."


def test_a_reply_is_seen_word_by_word(
    run_agent: AgentTask, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`llm.delta` is for those who watch now: it has no number, and reading later gives the whole reply."""
    model.will_say({"text": "Apples, pears and melons."})
    seen: list[RunEvent] = []
    monkeypatch.setattr(model, "may_go_on", lambda piece: seen)  # it speaks once somebody watches
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="words", input_text="What is there?"))

    for event in handle.events():
        seen.append(event)
    live = [event for event in seen if event.name == "llm.delta"]
    later = [event.name for event in handle.events()]

    assert {event.seq for event in live} == {None}
    assert "".join(str(event.payload["text"]) for event in live) == "Apples, pears and melons."
    assert "llm.delta" not in later


def test_a_run_ends_with_exactly_one_terminal_event(run_agent: AgentTask, model: Model) -> None:
    """`run.completed`, `run.failed` or `run.cancelled`; the event after it is marked final."""
    model.will_say({"text": "Goodbye."})
    handle = run_agent.delay(RunRequest(agent_id="clerk", session_id="goodbye", input_text="Goodbye."))

    *_, terminal, final = handle.events()

    assert (terminal.name, terminal.is_terminal) == ("run.completed", True)
    assert (final.name, final.final) == ("session.run.completed", True)
