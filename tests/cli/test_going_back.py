"""The command line: forks, copies of sessions, and what is put into a run while it works."""

from __future__ import annotations

import json

import pytest

from openagents_worker.producer.client import Client
from tests.cli.conftest import Command
from tests.support.scripts import Hand


@pytest.fixture
def begun(hand: Hand) -> str:
    """A run with two steps."""
    start = {"transcript_length": 0, "artifact_count": 0, "definition_hash": "h"}
    record = {"call": "prepare", "v": 2, "kind": "prepare", "name": "", "outcome": {"ok": start}}
    hand.submit("r1")
    hand.claim("r1")
    hand.commit_texts("r1", *(json.dumps({**record, "call": f"c:{n}"}) for n in range(3)))
    return "r1"


def test_a_run_is_forked(command: Command, client: Client, begun: str) -> None:
    """By the number of a step or by a checkpoint id. The id of the new run is printed."""
    forked = command("fork", begun, "1", "--input", "Or this?", "--run-id", "r2")
    assert (forked.code, forked.out) == (0, "r2\n"), forked.err
    again = command("fork", begun, "r1:step:2", "--session", "new", "--json").json

    assert again == {**again, "session_id": "new", "forked_from": "r1:step:2"}
    record = client.record("r2")
    assert record.request is not None
    assert (record.request.input_text, record.steps) == ("Or this?", 1)
    assert "fork of   r1:step:1\n" in command("show", "r2").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("r1", "7"), "its last checkpoint is 'r1:step:2'"),
        (("r1", "r2:step:1"), "is not one of the run 'r1'"),
        (("r1", "first"), "is not one of the run 'r1'"),
        (("nobody", "1"), "run.not_found"),
    ],
)
def test_what_cannot_be_forked_is_refused(
    command: Command, begun: str, arguments: tuple[str, ...], said: str
) -> None:
    """With the reason."""
    done = command("fork", *arguments)
    assert (done.code != 0, said in done.err) == (True, True), done.err


def test_a_session_is_copied(command: Command, begun: str) -> None:
    """To a new id or to the given one."""
    made = command("fork-session", "s1")
    assert made.out.startswith("s1-fork-"), made.err
    assert command("fork-session", "s1", "s2", "--json").json == {"session_id": "s2", "forked_from": "s1"}
    assert "run.conflict" in command("fork-session", "s1", "s2").err


def test_a_run_is_steered_and_its_budget_extended(command: Command, client: Client, begun: str) -> None:
    """With the name of the user."""
    assert command("steer", begun, "Be brief.", "--by", "ada").out == "r1: sent\n"
    assert command("steer", begun, "Really.", "--by", "ada", "--json").json == {"run_id": "r1"}
    assert command("extend", begun, "max_steps=9", "max_cost_usd=1.5", "--by", "ada").out == "r1: extended\n"
    assert command("extend", begun, "max_steps=9", "--by", "ada", "--json").json == {"run_id": "r1"}
    refused = command("extend", begun, "steps=9")
    assert (refused.code, "steps" in refused.err) == (2, True), refused.err

    facts = client.store.ask(lambda r: r.hgetall(client.store.keys("facts", begun)))
    assert [json.loads(facts[name]) for name in sorted(facts)] == [
        {"budget": {"max_cost_usd": 1.5, "max_steps": 9}, "by": "ada"},
        {"budget": {"max_steps": 9}, "by": "ada"},
        {"text": "Be brief.", "by": "ada"},
        {"text": "Really.", "by": "ada"},
    ]
