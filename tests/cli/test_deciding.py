"""`approvals`, `approve`, `deny` and `resolve`: a person decides about calls in a terminal."""

from __future__ import annotations

import json

import pytest

from openagents_worker.producer.client import Client
from openagents_worker.store.scripts import ScriptCall
from tests.cli.conftest import Command
from tests.support.script_calls import call

REFUND = "refund:0123456789abcdef:1"
ASKED = {
    "tool_id": "refund",
    "arguments": {"cents": 450},
    "requested_ms": 1_767_225_600_000,
    "default_action": "deny",
}


@pytest.fixture
def asking(client: Client) -> Client:
    """The run r1 has asked about a refund, and was interrupted in a payment."""

    def run(script: ScriptCall[object]) -> object:
        return client.store.run(script)

    run(call("register"))
    run(call("submit", request=json.dumps({"agent_id": "a", "session_id": "s1", "input_text": "hi"})))
    fence = client.store.run(call("claim")).fence
    run(call("ask", fence=fence, call=REFUND, value=json.dumps(ASKED)))
    run(call("intent", fence=fence, batch_no=2))
    run(call("suspend", fence=fence, kind="handover", batch_no=3))
    return client


def end(client: Client) -> None:
    client.store.run(call("cancel", force=True))
    client.store.run(call("retire"))


def test_a_person_sees_what_waits_and_approves_it(asking: Client, command: Command) -> None:
    """The id as it is displayed is enough to name the call."""
    listed = command("approvals", "--agent", "a")
    assert "refund:01234567:1" in listed.out
    assert "450" in listed.out
    assert command("approvals", "--agent", "b").out == ""
    assert command("approvals", "--json").json["items"][0]["call_id"] == REFUND

    arguments = json.dumps({"cents": 200})
    done = command("approve", "r1", "refund:01234567:1", "--arguments", arguments, "--by", "ada")

    assert (done.code, done.out) == (0, f"r1: {REFUND}: approve, decided by ada\n")
    assert command("approvals").out == ""
    second = command("deny", "r1", "refund", "--by", "bob")
    assert second.code == 2
    assert "approval.not_pending" in second.err
    end(asking)


def test_a_denial_has_a_note(asking: Client, command: Command) -> None:
    done = command("deny", "r1", "refund", "--note", "it has arrived", "--json")
    assert done.json["note"] == "it has arrived"
    assert done.json["by"], "the user of the operating system"
    end(asking)


def test_a_person_says_what_became_of_a_payment(asking: Client, command: Command) -> None:
    """A result that is not JSON is refused before anything is decided."""
    wrong = command("resolve", "r1", "pay", "skip", "--result", "receipt 17", "--by", "ada")
    assert wrong.code == 2
    assert "--result is not JSON" in wrong.err
    done = command("resolve", "r1", "pay", "skip", "--result", '{"receipt": 17}', "--by", "ada", "--json")
    assert (done.json["action"], done.json["result"]) == ("skip", {"receipt": 17})
    assert command("resolve", "r1", "pay", "again").code == 1
    end(asking)
