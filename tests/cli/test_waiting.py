"""The command line and parked runs: `send`, and what `show`, `runs` and `watch` say of them."""

from __future__ import annotations

import pytest

from openagents_worker.models import RunState, WaitKind
from openagents_worker.producer.client import Client
from openagents_worker.store.parking import Wait
from tests.cli.conftest import Command
from tests.support.scripts import Hand

UNTIL_MS = 4_102_444_800_000  # 2100


@pytest.fixture
def parked(hand: Hand) -> str:
    """A run that waits for a value, or for a time."""
    hand.submit("r1")
    hand.claim("r1")
    hand.park(
        "r1",
        Wait(WaitKind.SIGNAL, "paid", "paid:1", fact="signal:paid:"),
        Wait(WaitKind.TIMER, call_id="sleep:1", until_ms=UNTIL_MS),
    )
    return "r1"


def test_a_value_is_sent(command: Command, client: Client, parked: str) -> None:
    """The run continues. The same message id counts once."""
    done = command("send", parked, "paid", '{"cents": 450}', "--message-id", "m1")
    assert (done.code, done.out) == (0, "r1: paid was sent\n")
    assert client.record(parked).state is RunState.QUEUED
    again = command("send", parked, "paid", '{"cents": 450}', "--message-id", "m1", "--json")
    assert again.json == {"run_id": "r1", "name": "paid"}
    facts = client.store.ask(lambda r: r.hgetall(client.store.keys("facts", parked)))
    assert facts == {"signal:paid:1": '{"cents":450}'}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("paid", "soon"), 1, "a text needs quotes of its own"),
        (("two words",), 2, "the name of a signal must have 1 to 256 printable characters and no whitespace"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    command: Command, parked: str, arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = command("send", parked, *arguments)
    assert (done.code, said in done.err) == (code, True), done.err


def test_a_run_that_is_over_or_unknown_is_named(command: Command, client: Client, parked: str) -> None:
    client.cancel(parked)
    done = command("send", parked, "paid")
    assert (done.code, "run.conflict" in done.err) == (2, True)
    assert "run.not_found" in command("send", "r2", "paid").err


def test_show_and_runs_say_what_a_run_waits_for(command: Command, parked: str) -> None:
    shown = command("show", parked).out
    assert "waits for signal paid and for a timer; it continues at " in shown
    assert "parked: signal paid, timer" in shown  # the attempt
    listed = command("runs").out
    assert "signal paid, timer" in listed
    [item] = command("runs", "--state", "waiting", "--json").json["items"]
    assert [wait["kind"] for wait in item["waiting"]] == ["signal", "timer"]
    assert item["due_ms"] == UNTIL_MS
