"""What operators ask a client for: resuming many runs, the workers, what they serve and what waits for
them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from openagents_worker.errors import LLMRateLimitError, LLMResponseError, RequestInvalid, RunConflict
from openagents_worker.models import RunState
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.store import scripts
from openagents_worker.store.fleet import WorkerCard, read_fleet
from openagents_worker.store.stored_events import history
from tests.support.command_counts import calls_of
from tests.support.scripts import LEASE_MS, Hand


def fail(hand: Hand, run_id: str, error: Exception, *, steps: int = 0, durable: bool = True) -> None:
    """With the checkpoint of a prepared start, or without one."""
    hand.submit(run_id, durable=durable)
    hand.claim(run_id)
    if durable:
        hand.commit(run_id, steps=steps)
    hand.finish(run_id, error=error)


def end(client: Client, *run_ids: str) -> None:
    for run_id in run_ids:
        client.cancel(run_id)


# --- resuming --------------------------------------------------------------------------------------------


def test_a_failed_run_is_resumed_by_its_id(client: Client, hand: Hand) -> None:
    """From its last checkpoint, in a new life. The event has the name of the user."""
    fail(hand, "r1", LLMRateLimitError("slow down"), steps=2)

    handle = client.resume("r1", by="ada")
    events = client.store.execute(history(client.store.keys, "r1"))

    assert (handle.id, client.record("r1").state, client.record("r1").life) == ("r1", RunState.QUEUED, 2)
    resumed = next(event for event in events if event.name == "run.resumed")
    assert resumed.payload == {"checkpoint_id": "r1:step:2", "life": 2, "by": "ada"}
    end(client, "r1")


async def test_a_handle_resumes_its_run(client: Client, hand: Hand) -> None:
    """As the client does, from sync code and from asyncio."""
    fail(hand, "r1", LLMRateLimitError("slow down"), steps=2)
    fail(hand, "r2", LLMRateLimitError("slow down"), steps=2)
    assert await asyncio.to_thread(client.handle("r1").resume, by="ada") is None
    async with AsyncClient(settings=client.settings) as other:
        await other.handle("r2").resume()

    assert [client.record(id_).life for id_ in ("r1", "r2")] == [2, 2]
    end(client, "r1", "r2")


def test_a_run_that_has_completed_is_not_resumed(client: Client, hand: Hand) -> None:
    hand.submit("r1")
    hand.claim("r1")
    hand.commit("r1", steps=0)
    hand.finish("r1")

    with pytest.raises(RunConflict, match="has completed"):
        client.resume("r1")


def test_many_runs_are_resumed_and_one_bad_one_stops_nothing(client: Client, hand: Hand) -> None:
    """Those with the code that was asked for; one without a checkpoint, and one that nobody can read, are
    left."""
    fail(hand, "good-1", LLMRateLimitError("slow down"))
    fail(hand, "no-checkpoint", LLMRateLimitError("slow down"), durable=False)
    fail(hand, "other-code", LLMResponseError("no"))
    fail(hand, "broken", LLMRateLimitError("slow down"))
    fail(hand, "good-2", LLMRateLimitError("slow down"))
    key = client.store.keys("run", "broken")
    client.store.redis.hset(key, "usage", "not JSON")

    would_be = list(client.resume_all(code="llm.rate*", dry_run=True))
    resumed = list(client.resume_all(code="llm.rate*", by="ada"))

    assert would_be == ["good-2", "no-checkpoint", "good-1"]
    assert resumed == ["good-2", "good-1"]
    assert client.record("other-code").state is RunState.FAILED
    assert [(problem.key, problem.code) for problem in client.problems()] == [(key, "record.unreadable")]
    client.store.redis.hset(key, "usage", "{}")
    end(client, *resumed)


def test_only_the_runs_that_may_be_resumed_are_read(client: Client, hand: Hand) -> None:
    """However many others there are."""
    fail(hand, "failed", LLMRateLimitError("slow down"))
    others = [f"r{number}" for number in range(60)]
    for name in others:
        client.submit({"agent_id": "clerk", "session_id": name, "input_text": "hi", "run_id": name})
    before = calls_of(client, "hmget")

    assert list(client.resume_all(dry_run=True)) == ["failed"]

    assert calls_of(client, "hmget") - before == 1
    end(client, *others)


def test_a_run_with_an_overwritten_key_does_not_stop_the_others(client: Client, hand: Hand) -> None:
    """It is skipped with one warning, as every run that cannot be resumed."""
    fail(hand, "r1", LLMRateLimitError("slow down"))
    fail(hand, "r2", LLMRateLimitError("slow down"))
    overwrite(client, "r2")

    assert list(client.resume_all()) == ["r1"]

    end(client, "r1")


async def test_the_async_client_does_the_same(client: Client, hand: Hand) -> None:
    """Both clients share plans and scripts."""
    fail(hand, "r1", LLMRateLimitError("slow down"))

    async with AsyncClient(settings=client.settings) as other:
        dry = [run_id async for run_id in other.resume_all(dry_run=True)]
        resumed = [run_id async for run_id in other.resume_all(by="ada")]
        asked = (await other.workers(), await other.queues(), await other.agents(), await other.problems())
        await other.cancel("r1")

    assert dry == resumed == ["r1"]
    assert [worker.incarnation for worker in asked[0]] == ["hand:1"]
    assert asked[2:] == ([], [])


@pytest.mark.parametrize("state", ["completed", "running", ["failed", "completed"], "fialed", [], ""])
def test_only_failed_and_cancelled_runs_are_resumed(client: Client, hand: Hand, state: Any) -> None:
    """Another state is refused before anything is resumed. So is a list of states that is empty."""
    fail(hand, "r1", LLMRateLimitError("slow down"))

    with pytest.raises(RequestInvalid):
        list(client.resume_all(state=state))
    assert client.record("r1").state is RunState.FAILED

    assert list(client.resume_all(state=["cancelled", "failed"])) == ["r1"]
    end(client, "r1")


def test_runs_are_listed_by_the_code_they_failed_with(client: Client, hand: Hand) -> None:
    """A glob; a run that waits for a retry has the code that it waits for."""
    fail(hand, "r1", LLMRateLimitError("slow down"))
    fail(hand, "r2", LLMResponseError("no"))
    hand.submit("r3")
    hand.claim("r3")
    hand.retry("r3")

    def ids(code: str) -> list[str]:
        return [record.run_id for record in client.runs(code=code)]

    assert ids("llm.*") == ["r3", "r2", "r1"]
    assert ids("llm.rate_limit") == ["r3", "r1"]
    assert ids("tool.*") == []
    end(client, "r3")


def overwrite(client: Client, run_id: str) -> None:
    """Another program has used the key of the journal of this run."""
    key = client.store.keys("journal", run_id)
    client.store.redis.delete(key)
    client.store.redis.set(key, "text", ex=60)


# --- the fleet -------------------------------------------------------------------------------------------


def register(
    hand: Hand, incarnation: str, *, agents: dict[str, str], queues: tuple[str, ...] = ("agents",)
) -> None:
    announced = [
        w for id_, hash_ in agents.items() for w in (id_, json.dumps({"queue": None, "def_hash": hash_}))
    ]
    card = WorkerCard(host="box", pid=17, version="9.9", queues=queues, agents=agents, max_runs=20).to_json()
    hand.store.run(scripts.register(incarnation=incarnation, lease_ms=LEASE_MS, agents=announced, info=card))
    hand.store.run(scripts.renew(incarnation=incarnation, lease_ms=LEASE_MS, loop_lag_ms=40))


def test_workers_say_what_they_serve(client: Client, hand: Hand) -> None:
    """A worker of the previous version is listed, too, but its queues are not known."""
    register(hand, "w1@box:abc", agents={"clerk": "h1", "porter": "h2"})

    old, new = client.workers()

    assert (old.incarnation, old.says_what_it_serves, old.version) == ("hand:1", False, None)
    assert (new.host, new.pid, new.version, new.max_runs, new.runs) == ("box", 17, "9.9", 20, 0)
    assert (new.queues, new.agents, new.loop_lag_ms) == (("agents",), ("clerk", "porter"), 40)
    assert 0 < new.lease_left_ms <= LEASE_MS
    assert new.started_at is not None
    assert new.serves("agents", "clerk")
    assert not new.serves("agents", "somebody")
    assert not new.serves("elsewhere", "clerk")
    hand.store.run(scripts.retire(incarnation="w1@box:abc"))
    assert [worker.incarnation for worker in client.workers()] == ["hand:1"]


def test_a_queue_that_nobody_serves_is_seen(client: Client, hand: Hand) -> None:
    """A queue is found by its waiting runs or by its consumers."""
    register(hand, "w1@box:abc", agents={"assistant": "h1"})
    odd = "with:colon*?[x] ä"
    hand.submit("r1", "s1", queue=odd)
    hand.submit("r2", "s2", queue=odd)
    hand.submit("r3", "s3")

    queues = {queue.name: queue for queue in client.queues()}

    assert (queues[odd].waiting, queues[odd].workers) == (2, ())
    assert (queues["agents"].waiting, queues["agents"].workers) == (1, ("w1@box:abc",))
    assert queues[odd].oldest_age_ms is not None
    end(client, "r1", "r2", "r3")
    hand.store.run(scripts.retire(incarnation="w1@box:abc"))


def test_agents_are_served_by_workers_that_have_them_and_their_queue(client: Client, hand: Hand) -> None:
    """An agent stays known after its last worker has ended. The names of all keys are not scanned for that:
    a Redis has millions, and a producer may not do it."""
    register(hand, "w1@box:a", agents={"clerk": "h1"})
    register(hand, "w2@box:b", agents={"clerk": "h1", "porter": "h2"}, queues=("other",))
    scans = calls_of(client, "scan")

    agents = {agent.id: agent for agent in client.agents()}

    assert calls_of(client, "scan") == scans
    assert agents["clerk"].workers == ("w1@box:a",)
    assert (agents["porter"].workers, agents["porter"].queue) == ((), "agents")
    for incarnation in ("w1@box:a", "w2@box:b"):
        hand.store.run(scripts.retire(incarnation=incarnation))
    assert [agent.workers for agent in client.agents()] == [(), ()]


def test_what_a_worker_of_the_version_before_leaves_is_taken_away(client: Client, hand: Hand) -> None:
    """It ends leases without updating the announcements; the next registration updates them."""
    register(hand, "w1@box:a", agents={})
    client.store.redis.zrem(client.store.keys("workers"), "w1@box:a")

    register(hand, "w2@box:b", agents={})

    assert client.store.redis.hkeys(client.store.keys("fleet")) == ["w2@box:b"]
    hand.store.run(scripts.retire(incarnation="w2@box:b"))


def test_messages_that_were_sent_again_are_counted(client: Client, hand: Hand) -> None:
    hand.submit("r1")

    call = scripts.resend(queue="agents", oldest_us=2**53 - 1, grace_ms=-1000, limit=10)
    assert [wake.run_id for wake in hand.store.run(call)] == ["r1"]

    fleet = client.store.execute(read_fleet(client.store.keys, "agents"))
    assert [(queue.name, queue.sent_again) for queue in fleet.queues] == [("agents", 1)]
    end(client, "r1")


# --- results ---------------------------------------------------------------------------------------------


def test_the_output_of_a_result_is_the_answer_or_raises(client: Client, hand: Hand) -> None:
    """`wait()` gives a result for a failed run, too, whose `final_output` is None; `output` cannot be
    mistaken."""
    from openagents_worker.errors import RunFailed

    fail(hand, "r1", LLMResponseError("wrong key", hint="look"))
    hand.submit("r2")
    hand.claim("r2")
    hand.finish("r2", "391")

    failed: Any = client.handle("r1").wait()
    with pytest.raises(RunFailed, match="wrong key") as raised:
        _ = failed.output

    assert (raised.value.code, raised.value.run_id) == ("llm.response", "r1")
    assert failed.final_output is None
    assert client.handle("r2").wait().output == "391"
