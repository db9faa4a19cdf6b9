"""Deleting a session: live runs are not deleted, and no byte of a deleted session remains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from openagents_worker.errors import RunNotFound, SessionBusy, SessionNotFound
from openagents_worker.producer import deletion
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.store import scripts
from tests.support.scripts import Hand


def submit(client: Client, run_id: str, session_id: str = "s1", **options: Any) -> None:
    request = {
        "agent_id": "clerk",
        "session_id": session_id,
        "input_text": f"secret of {session_id}",
        "run_id": run_id,
        "tenant": "acme",
        "labels": {"env": "prod"},
    }
    client.submit(request, **options)


def told(client: Client, *run_ids: str) -> None:
    """As a worker does after it has notified Celery of an end."""
    client.store.run(scripts.confirm_completion(runs=[word for run_id in run_ids for word in (run_id, "1")]))


def traces(client: Client, session_id: str) -> list[str]:
    """Every key with the session in its name or content, without the messages in the broker."""
    found = []
    for key in client.store.redis.scan_iter("oa:*"):
        content = _CONTENT[client.store.redis.type(key)](client.store.redis, key)
        if session_id in key or session_id in str(content):
            found.append(key)
    return found


_CONTENT: dict[str, Callable[[Any, str], Any]] = {
    "hash": lambda redis, key: redis.hgetall(key),
    "list": lambda redis, key: redis.lrange(key, 0, -1),
    "set": lambda redis, key: redis.smembers(key),
    "zset": lambda redis, key: redis.zrange(key, 0, -1),
    "stream": lambda redis, key: redis.xrange(key),
    "string": lambda redis, key: redis.get(key),
}


def test_nothing_is_left_of_a_deleted_session(client: Client, hand: Hand) -> None:
    """Runs, journals, events, lists; what others have stays."""
    for run_id in ("gone-1", "gone-2"):
        hand.submit(run_id, "gone")
        hand.claim(run_id)
        hand.emit(run_id, "llm.called", payload='{"model":"gone"}')
        hand.delta(run_id, "gone")
        hand.finish(run_id, transcript=[{"role": "user", "content": "gone"}], state={"gone": 1})
    submit(client, "kept", "other")

    assert client.delete_session("gone") == 2

    assert traces(client, "gone") == []
    assert [record.run_id for record in client.runs()] == ["kept"]
    with pytest.raises(SessionNotFound):
        client.session("gone")
    with pytest.raises(RunNotFound):
        client.record("gone-1")
    client.cancel("kept")


def test_deleting_what_is_not_there_deletes_nothing(client: Client) -> None:
    """It may be repeated."""
    assert client.delete_session("nobody") == 0


def test_more_runs_than_one_call_takes(client: Client, hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are deleted in parts, so that Redis is not blocked."""
    monkeypatch.setattr(deletion, "RUNS_A_CALL", 2)
    for number in range(7):
        hand.end(f"r{number}", steps=1)

    assert client.delete_session("s1") == 7

    assert traces(client, "s1") == []


@pytest.mark.parametrize("state", ["queued", "waiting_session", "running", "retrying", "scheduled"])
def test_a_live_run_is_in_the_way(client: Client, hand: Hand, state: str) -> None:
    """In any state. Nothing of the session is deleted, also not its ended runs."""
    hand.end("ended", steps=1)
    if state == "waiting_session":
        submit(client, "first")
    submit(client, "r1", delay_ms=60_000 if state == "scheduled" else 0)
    if state in ("running", "retrying"):
        hand.claim("r1")
    if state == "retrying":
        hand.retry("r1")
    assert client.record("r1").state == state

    with pytest.raises(SessionBusy) as caught:
        client.delete_session("s1")

    assert caught.value.code == "session.busy"
    assert client.record("ended").state == "completed"
    assert client.record("r1").state == state
    told(client, "r1", "first")


@pytest.mark.parametrize("state", ["queued", "running", "retrying", "scheduled"])
def test_force_cancels_first(client: Client, hand: Hand, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of the queue first, so that no end starts another run; a zombie writes nothing."""
    monkeypatch.setattr(deletion, "PATIENCE_S", 0.2)  # no worker notifies Celery here
    submit(client, "r1", delay_ms=60_000 if state == "scheduled" else 0)
    submit(client, "r2")
    submit(client, "r3")
    if state in ("running", "retrying"):
        hand.claim("r1")
    if state == "retrying":
        hand.retry("r1")

    assert client.delete_session("s1", force=True) == 3

    assert traces(client, "s1") == []
    if state == "running":
        with pytest.raises(AssertionError):  # FENCED
            hand.emit("r1", "llm.called")


def test_an_end_that_celery_does_not_know_is_waited_for(client: Client, hand: Hand) -> None:
    """Callbacks of a run are called before it is deleted; without force for ever, with a clear word."""
    submit(client, "r1")
    client.cancel("r1")
    pauses: list[object] = []

    def told_after_three_pauses(step: object) -> None:
        pauses.append(step)
        if len(pauses) == 3:
            told(client, "r1")

    plan = deletion.deletion(client.store.keys, "s1", force=False, send=pauses.append, clock=lambda: 0.0)
    assert client.store.execute(plan, told_after_three_pauses) == 1

    assert pauses == [deletion.PAUSE_S] * 3


@pytest.mark.parametrize(
    ("recipient", "name"), [("open_jobs", "job:render:1"), ("open_responses", "response:m:1")]
)
def test_what_a_run_has_left_behind_is_cancelled_first(
    client: Client, hand: Hand, recipient: str, name: str
) -> None:
    """A worker cancels it with the facts of the run. With force, this does not take longer than the rest."""
    client.store.run(scripts.outbox_take(recipient=recipient, limit=0, retry_ms=0, max_retry_ms=0))
    for run_id in ("r1", "r2"):
        hand.submit(run_id, "s1")
        hand.claim(run_id)
        client.store.redis.hset(client.store.keys("facts", run_id), name, "{}")
        hand.finish(run_id)
    pauses: list[object] = []

    def delivered_after_two_pauses(step: object) -> None:
        pauses.append(step)
        if len(pauses) == 2:
            client.store.run(scripts.outbox_done(recipient=recipient, ends=["r1", "1", "r2", "1"]))

    plan = deletion.deletion(client.store.keys, "s1", force=True, send=pauses.append, clock=lambda: 0.0)
    assert client.store.execute(plan, delivered_after_two_pauses) == 2

    assert pauses == [deletion.PAUSE_S] * 2


def test_without_anybody_to_tell_celery_only_force_deletes(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for some time, and the error has the reason."""
    monkeypatch.setattr(deletion, "PATIENCE_S", 0.2)
    submit(client, "r1")
    client.cancel("r1")

    with pytest.raises(SessionBusy, match="Celery was not notified"):
        client.delete_session("s1")
    assert client.delete_session("s1", force=True) == 1


@pytest.mark.parametrize("force", [False, True])
def test_a_run_of_another_session_with_the_id_of_an_expired_run_stays(
    client: Client, hand: Hand, force: bool
) -> None:
    """Whether it is live or has ended, and also what its children have."""
    hand.end("r1", steps=1)
    keys, redis = client.store.keys, client.store.redis
    redis.delete(*(keys(kind, "r1") for kind in ("run", "events", "facts", "journal")))
    hand.submit("r1", "s2")
    redis.zadd(keys("index", "parent=r1"), {"child": 1})
    redis.hset(keys("run", "child"), mapping={"state": "queued", "session": "of child"})
    redis.hset(keys("session", "of child"), "of_child", "r1")

    assert client.delete_session("s1", force=force) == 0
    assert client.record("r1").state == "queued"
    assert redis.hget(keys("run", "child"), "state") == "queued"

    redis.zadd(keys("index", "session=s1"), {"r1": 1})
    redis.delete(keys("run", "child"), keys("session", "of child"))
    redis.delete(keys("index", "parent=r1"))
    hand.claim("r1")
    hand.finish("r1")
    assert client.delete_session("s1", force=force) == 0
    assert client.record("r1").state == "completed"
    assert redis.zrange(keys("index", "session=s1"), 0, -1) == []


async def test_asyncio_deletes_the_same(client: Client, hand: Hand) -> None:
    """One implementation serves both clients."""
    hand.end("r1", steps=1)
    submit(client, "r2")
    async with AsyncClient(settings=client.settings) as same:
        with pytest.raises(SessionBusy):
            await same.delete_session("s1")
        client.cancel("r2")
        told(client, "r2")
        assert await same.delete_session("s1") == 2
    assert traces(client, "s1") == []


def test_a_session_of_that_name_begins_anew(client: Client, hand: Hand) -> None:
    """The same run id, too: it is another run."""
    hand.end("r1", steps=1)
    client.delete_session("s1")

    submit(client, "r1")

    assert client.record("r1").state == "queued"
    assert client.session("s1").transcript == ()
    client.cancel("r1")
