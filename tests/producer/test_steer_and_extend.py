"""What a producer puts into a run while it works: a message of the user, and a larger budget."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openagents_worker.errors import RequestInvalid, RequestTooLarge, RunConflict, RunNotFound
from openagents_worker.models import RunBudget
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.store.signals import MAX_SIGNALS_BYTES
from tests.support.scripts import Hand


def facts_of(hand: Hand, run_id: str = "r1") -> dict[str, Any]:
    stored = hand.store.redis.hgetall(hand.store.keys("facts", run_id))
    return {name: json.loads(text) for name, text in sorted(stored.items())}


async def test_messages_and_extensions_are_stored_in_their_order(
    redis_url: str, hand: Hand, client: Client
) -> None:
    """By all clients and handles; the same message_id counts once."""
    hand.submit("r1")
    async with AsyncClient(redis_url) as aclient:
        client.steer("r1", "One.", by="ada", message_id="m1")
        client.handle("r1").steer("One again.", message_id="m1")
        await aclient.steer("r1", "Two.")
        await aclient.handle("r1").steer("Three.")
        client.extend("r1", {"max_steps": 5}, by="ada")
        client.handle("r1").extend(RunBudget(max_cost_usd=2))
        await aclient.extend("r1", {"max_tool_calls": "7"})
        await aclient.handle("r1").extend({"max_total_tokens": 100})

    steered = [value for name, value in facts_of(hand).items() if name.startswith("steer:")]
    assert steered == [
        {"text": "One.", "by": "ada"},
        {"text": "Two.", "by": ""},
        {"text": "Three.", "by": ""},
    ]
    extended = [value for name, value in facts_of(hand).items() if name.startswith("extend:")]
    assert extended == [
        {"budget": {"max_steps": 5}, "by": "ada"},
        {"budget": {"max_cost_usd": 2.0}, "by": ""},
        {"budget": {"max_tool_calls": 7}, "by": ""},
        {"budget": {"max_total_tokens": 100}, "by": ""},
    ]


@pytest.mark.parametrize("text", ["", " \n", None, 7])
def test_a_message_needs_a_text(redis_url: str, hand: Hand, client: Client, text: Any) -> None:
    """A model gets nothing from an empty one."""
    hand.submit("r1")
    with pytest.raises(RequestInvalid, match="text of steer"):
        client.steer("r1", text)
    assert facts_of(hand) == {}


def test_a_message_has_a_bound(redis_url: str, hand: Hand, client: Client) -> None:
    """Every claim of the run reads all messages that it did not take yet."""
    hand.submit("r1")
    with pytest.raises(RequestTooLarge, match="bytes"):
        client.steer("r1", "x" * (MAX_SIGNALS_BYTES + 1))


@pytest.mark.parametrize(
    ("budget", "problem"),
    [
        ({}, "has no limit"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_stpes": 3}, "max_stpes"),
        ({"max_resume_attempts": 9}, "max_resume_attempts cannot be extended"),
        ({"max_duration_ms": 11 * 365 * 24 * 3_600_000}, "max_duration_ms"),
        ({"on_breach": "pause"}, "on_breach cannot be extended"),
        ({"max_steps": 2}, "smaller than the limit 3"),
        ({"max_cost_usd": float("inf")}, "max_cost_usd"),
        ("more", "budget"),
    ],
)
def test_an_extension_that_is_not_valid_is_refused(
    redis_url: str, hand: Hand, client: Client, budget: Any, problem: str
) -> None:
    """With the reason; nothing is stored."""
    request = {"agent_id": "assistant", "session_id": "s1", "input_text": "hi", "run_id": "r1"}
    client.submit({**request, "budget": {"max_steps": 3}})
    with pytest.raises(RequestInvalid, match=problem):
        client.extend("r1", budget)
    assert facts_of(hand) == {}


def test_a_run_that_is_over_takes_nothing(redis_url: str, hand: Hand, client: Client) -> None:
    """The caller hears that its message or extension has no effect."""
    hand.end("r1", steps=1)
    for use in (lambda: client.steer("r1", "Hello?"), lambda: client.extend("r1", {"max_steps": 9})):
        with pytest.raises(RunConflict, match="is over"):
            use()
    with pytest.raises(RunNotFound):
        client.steer("nobody", "Hello?")
    with pytest.raises(RunNotFound):
        client.extend("nobody", {"max_steps": 9})
