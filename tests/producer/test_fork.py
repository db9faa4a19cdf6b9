"""Forks: a new run goes on from a step of another run, and nothing before it is executed again."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openagents_worker.errors import (
    ConfigError,
    HeldTurnsExpired,
    OpenAgentsError,
    RequestInvalid,
    RunConflict,
    RunNotFound,
    SessionNotFound,
)
from openagents_worker.models import RunState
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.store.facts import FactKind
from openagents_worker.store.formats import HOLDS_TURNS
from tests.support.scripts import Hand


def begun(
    hand: Hand,
    *,
    messages: int = 2,
    steps: int = 3,
    session_id: str = "s1",
    context: dict[str, Any] | None = None,
) -> None:
    """The run r1 with some steps. Its session had two messages when it began, and has four now."""
    hand.store.redis.rpush(hand.store.keys("transcript", session_id), *map(json.dumps, MESSAGES))
    state = {"color": '"red"', "memory_buffer": "[]"}
    hand.store.redis.hset(hand.store.keys("session_state", session_id), mapping=state)
    hand.submit("r1", session_id)
    hand.claim("r1")
    start = {"transcript_length": messages, "artifact_count": 0, "definition_hash": "h"}
    outcome = {"ok": start, "context": context or {}}
    record = {"call": "prepare", "v": 2, "kind": "prepare", "name": "", "outcome": outcome}
    hand.commit_texts(
        "r1", json.dumps(record), *(json.dumps({"call": f"c:{n}"}) for n in range(1, steps + 1))
    )


MESSAGES = [{"role": role, "content": f"{role} {turn}"} for turn in (1, 2) for role in ("user", "assistant")]


def journal_of(hand: Hand, run_id: str) -> list[Any]:
    return [
        json.loads(text)["call"]
        for text in hand.store.redis.lrange(hand.store.keys("journal", run_id), 0, -1)
    ]


def test_a_fork_has_the_steps_up_to_its_checkpoint(redis_url: str, hand: Hand, client: Client) -> None:
    """It is a run of its own: queued, with the same request, and it names where it comes from."""
    begun(hand)

    handle = client.fork("r1", "r1:step:2", run_id="r2")

    record = client.record("r2")
    assert handle.id == "r2"
    assert (record.state, record.steps, record.life) == (RunState.QUEUED, 2, 1)
    assert record.forked_from == "r1:step:2"
    assert record.request is not None
    assert (record.request.input_text, record.request.run_id) == ("hi", "r2")
    assert journal_of(hand, "r2") == ["prepare", "c:1", "c:2"]
    assert journal_of(hand, "r1") == ["prepare", "c:1", "c:2", "c:3"]
    first = next(iter(handle.events()))
    assert (first.name, first.payload) == ("run.forked", {"from_run_id": "r1", "checkpoint_id": "r1:step:2"})


def test_a_fork_sees_the_session_as_it_was_when_the_run_began(
    redis_url: str, hand: Hand, client: Client
) -> None:
    """Its new session has the messages from before the run, and the state of now.

    The memory of turns is left out: it may hold turns that were added since then.
    """
    begun(hand, messages=2)
    record = client.fork("r1", "r1:step:0", input_text="Or this?").record()

    session = client.session(record.session_id)
    assert record.session_id.startswith("s1-fork-")
    assert list(session.transcript) == MESSAGES[:2]
    assert session.state == {"color": "red"}
    assert session.holder == record.run_id
    assert record.request is not None
    assert record.request.input_text == "Or this?"


def test_a_fork_of_the_newest_run_keeps_the_memory_of_turns(
    redis_url: str, hand: Hand, client: Client
) -> None:
    """Nothing was added to the session since the run began."""
    begun(hand, messages=len(MESSAGES))
    record = client.fork("r1", "r1:step:0").record()
    assert client.session(record.session_id).state == {"color": "red", "memory_buffer": []}


def test_a_fork_in_the_same_session_waits_for_its_turn(redis_url: str, hand: Hand, client: Client) -> None:
    """Nothing is copied."""
    begun(hand)
    client.fork("r1", "r1:step:1", session_id="s1", run_id="r2")

    session = client.session("s1")
    assert (session.holder, session.waiting) == ("r1", ("r2",))
    assert list(session.transcript) == MESSAGES


def test_the_same_fork_again_is_the_same_run(redis_url: str, hand: Hand, client: Client) -> None:
    """With a run_id, a fork may be repeated; another fork with this id is refused."""
    begun(hand)
    one, two = client.fork("r1", "r1:step:1", run_id="r2"), client.fork("r1", "r1:step:1", run_id="r2")

    assert one.record() == two.record()
    with pytest.raises(RunConflict, match="another request"):
        client.fork("r1", "r1:step:2", run_id="r2")
    with pytest.raises(RunConflict, match="another request"):
        client.fork("r1", "r1:step:1", run_id="r2", input_text="other")


def test_what_is_not_recorded_is_not_known_to_a_fork(redis_url: str, hand: Hand, client: Client) -> None:
    """Decisions and calls that had begun stay with the run; an event names these calls."""
    begun(hand)
    facts = hand.store.keys("facts", "r1")
    hand.store.redis.hset(
        facts, mapping={f"{FactKind.INTENT}:pay:0a:1": "{}", f"{FactKind.APPROVAL}:x": "{}"}
    )

    handle = client.fork("r1", "r1:step:1")

    assert not hand.store.redis.exists(hand.store.keys("facts", handle.id))
    assert next(iter(handle.events())).payload["dropped_intents"] == ["pay:0a:1"]


def test_a_fork_needs_the_turns_that_its_source_saw(redis_url: str, hand: Hand, client: Client) -> None:
    """A shared child sees turns that its parent holds. They expire with the parent."""
    begun(hand, context={"held": ["gone", 0, 2]})
    hand.store.redis.hset(hand.store.keys("run", "r1"), "format", str(HOLDS_TURNS))
    with pytest.raises(HeldTurnsExpired, match="'gone'") as expired:
        client.fork("r1", "r1:step:0", run_id="r2")
    assert "new run" in str(expired.value.hint)
    assert {run.run_id for run in client.runs()} == {"r1"}


@pytest.mark.parametrize(
    ("checkpoint_id", "options", "error", "hint"),
    [
        ("r1", {}, RequestInvalid, "form"),
        ("r1:step:", {}, RequestInvalid, "form"),
        ("r1:step:-1", {}, RequestInvalid, "form"),
        ("r1:step:" + "9" * 400, {}, RequestInvalid, "form"),
        ("r1:step:4", {}, ConfigError, "r1:step:3"),
        ("nobody:step:1", {}, RunNotFound, "never submitted"),
        ("r1:step:1", {"session_id": "other"}, RunConflict, "new session_id"),
        ("r1:step:1", {"session_id": "a b"}, RequestInvalid, "whitespace"),
        ("r1:step:1", {"run_id": "r1"}, RunConflict, "choose another run_id"),
        ("empty:step:0", {}, ConfigError, "submit a new run"),
    ],
)
def test_what_cannot_be_forked_is_refused(
    redis_url: str,
    hand: Hand,
    client: Client,
    checkpoint_id: str,
    options: dict[str, str],
    error: type[OpenAgentsError],
    hint: str,
) -> None:
    """With what would be right; nothing is created."""
    begun(hand)
    hand.submit("empty", "other")
    with pytest.raises(error, match=hint):
        client.fork(checkpoint_id.partition(":")[0], checkpoint_id, **options)
    assert {run.run_id for run in client.runs()} == {"r1", "empty"}


def test_a_checkpoint_is_one_of_the_named_run(redis_url: str, hand: Hand, client: Client) -> None:
    """Else a wrong id would silently fork another run."""
    begun(hand)
    with pytest.raises(RequestInvalid, match="'r1:step:\\{n\\}'"):
        client.handle("r1").fork("r2:step:1")
    with pytest.raises(RequestInvalid, match="'r1:step:\\{n\\}'"):
        client.fork("r1", "r2:step:1")
    assert client.handle("r1").fork("r1:step:1").record().forked_from == "r1:step:1"


async def test_forks_with_asyncio(redis_url: str, hand: Hand) -> None:
    """The same for both clients and both handles."""
    begun(hand)
    async with AsyncClient(redis_url) as client:
        one = await client.fork("r1", "r1:step:1")
        two = await client.handle("r1").fork("r1:step:1", session_id="new")
        copied = await client.fork_session("new")

        assert (await one.record()).forked_from == (await two.record()).forked_from == "r1:step:1"
        assert (await client.session(copied)).transcript == tuple(MESSAGES[:2])


def test_a_session_is_copied(redis_url: str, hand: Hand, client: Client) -> None:
    """Everything that its runs have written, but none of its runs; both go on separately."""
    begun(hand)

    assert client.fork_session("s1", "s2") == "s2"

    copy = client.session("s2")
    assert (list(copy.transcript), copy.state, copy.holder) == (
        MESSAGES,
        {"color": "red", "memory_buffer": []},
        None,
    )
    assert "s2" in [session.session_id for session in client.sessions()]
    with pytest.raises(RunConflict, match="choose another"):
        client.fork_session("s1", "s2")
    with pytest.raises(SessionNotFound):
        client.fork_session("nothing")
    with pytest.raises(RequestInvalid, match="whitespace"):
        client.fork_session("s1", "a b")
