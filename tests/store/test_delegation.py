"""The answers of the script by which a run creates its children."""

from __future__ import annotations

import json

import pytest

from openagents_worker.errors import RedisWrongType
from openagents_worker.store.formats import DELEGATES, HOLDS_TURNS
from tests.store.test_scripts import HOUR_MS, Bench, bench

__all__ = ["bench"]  # a fixture

CHILD = {"child_id": "r5", "session_id": "child:r5"}


def test_a_child_gets_the_queue_of_its_agent_or_of_its_parent(bench: Bench) -> None:
    fence = bench.claimed(queue="reports")
    born = bench.do("delegate", fence=fence, **CHILD)
    assert (born.answer, born.wakes[0].queue) == ("NEW", "reports")
    bench.do("register", agents=["helper", json.dumps({"queue": "gpu"})])
    born = bench.do("delegate", fence=fence, child_id="r6", session_id="child:r6", call="helper:bb:1")
    assert (born.answer, born.wakes[0].queue) == ("NEW", "gpu")
    format_ = bench.redis.hget(bench.store.keys("run", "r5"), "format")
    assert format_ == str(DELEGATES)


def test_a_child_keeps_the_task_options_of_its_call(bench: Bench) -> None:
    """They have the header by which its spans belong to the trace of its parent."""
    options = '{"headers":{"traceparent":"00-1"}}'
    born = bench.do("delegate", fence=bench.claimed(), canvas=options, **CHILD)
    assert born.wakes[0].canvas == options
    assert bench.redis.hget(bench.store.keys("run", "r5"), "canvas") == options


def test_an_agent_that_no_worker_knows_gets_no_child(bench: Bench) -> None:
    fence = bench.claimed()
    bench.do("register", agents=["other", "{}"])
    refused = bench.do("delegate", fence=fence, **CHILD)
    assert (refused.answer, refused.known_agents) == ("UNKNOWN_AGENT", ("other",))
    assert not bench.redis.exists(bench.store.keys("run", "r5"))


def test_a_run_has_a_largest_number_of_children(bench: Bench) -> None:
    """Those that have ended do not count, and neither does one that exists already."""
    fence = bench.claimed()
    assert bench.do("delegate", fence=fence, max_children=1, **CHILD).answer == "NEW"
    more = {"child_id": "r6", "session_id": "child:r6", "call": "helper:bb:1", "max_children": 1}
    assert bench.do("delegate", fence=fence, **more).answer == "FULL"
    assert bench.do("delegate", fence=fence, max_children=1, **CHILD).answer == "SAME"
    bench.do("cancel", run_id="r5")
    assert bench.do("delegate", fence=fence, **more).answer == "NEW"


def test_a_child_in_the_background_ends_with_a_later_life_of_its_parent(bench: Bench) -> None:
    """The life that has created it has failed, and left it alone. It is still a child of the run."""
    fence = bench.claimed()
    bench.do("delegate", fence=fence, background=True, **CHILD)
    bench.do("finish", fence=fence, end_state="failed")
    assert bench.field("state", "r5") == "queued"
    assert bench.redis.pttl(bench.store.keys("children", "r1")) > 0, "it expires with its parent"
    bench.do("resume")
    assert bench.redis.pttl(bench.store.keys("children", "r1")) == -1
    bench.do("cancel")
    assert (bench.field("state", "r1"), bench.field("state", "r5")) == ("cancelled", "cancelled")
    assert not bench.redis.exists(bench.store.keys("children", "r1"))
    bench.do("resume")
    assert bench.field("state", "r5") == "cancelled", "its parent has the answer that it was started"


def test_a_child_in_the_background_outlives_the_record_of_its_parent(bench: Bench) -> None:
    """Its end removes it from the set of the parent."""
    fence = bench.claimed()
    bench.do("delegate", fence=fence, background=True, **CHILD)
    bench.do("finish", fence=fence)
    bench.redis.delete(bench.store.keys("run", "r1"))
    bench.do("cancel", run_id="r5")
    assert not bench.redis.exists(bench.store.keys("children", "r1"))


def test_a_parent_whose_wait_is_over_gets_no_messages_until_its_child_has_ended(bench: Bench) -> None:
    """It has lent its session, so it cannot continue. Its messages do not count as lost ones."""
    fence = bench.claimed()
    bench.do("commit", fence=fence)
    shared = {"child_id": "r5", "session_id": "s1", "mode": "shared", "format": HOLDS_TURNS}
    bench.do("delegate", fence=fence, batch_no=2, stored=1, **shared)
    parked = {"kind": "park", "park_state": "waiting_child", "waiting_payload": "{}", "batch_no": 3}
    waits = json.dumps([{"kind": "child", "name": "r5", "fact": "child:helper:aa:1", "until_ms": 1}])
    bench.do("suspend", fence=fence, waits=waits, due_ms=1, **parked)
    child = bench.do("claim", run_id="r5").fence
    assert [wake.run_id for wake in bench.do("wake").wakes] == ["r1"]

    assert bench.do("claim").answer == "WAITING"
    bench.lab.let_pass(HOUR_MS)
    assert bench.do("resend", grace_ms=0) == ()

    bench.do("register")
    ended = bench.do("finish", run_id="r5", fence=child)
    assert [wake.run_id for wake in ended.wakes] == ["r1"]
    assert bench.do("claim").answer == "CLAIMED"


def test_only_the_owner_of_the_whole_journal_delegates(bench: Bench) -> None:
    """A worker whose records Redis has lost must not go on."""
    fence = bench.claimed()
    assert bench.do("delegate", fence="7:other", **CHILD).answer == "FENCED"
    assert bench.do("delegate", fence=fence, stored=1, **CHILD).answer == "MISPLACED"


def test_the_session_of_a_child_expires_with_its_run(bench: Bench) -> None:
    """Nobody else knows the id of this session."""
    fence = bench.claimed()
    bench.do("delegate", fence=fence, **CHILD)
    bench.do("cancel", run_id="r5")
    bench.do("cancel", run_id="r1", force=True)
    ttl_ms = bench.redis.pttl(bench.store.keys("session", "child:r5"))
    assert 0 < ttl_ms <= bench.redis.pttl(bench.store.keys("run", "r5")) + 60_000


def test_a_child_whose_facts_cannot_be_read_is_not_begun_again(bench: Bench) -> None:
    """The script fails before it has written anything."""
    fence = bench.claimed()
    bench.do("delegate", fence=fence, **CHILD)
    bench.do("cancel", run_id="r1", force=True)
    bench.do("resume")
    fence = bench.do("claim").fence
    bench.redis.set(bench.store.keys("facts", "r5"), "not a hash", px=60_000)
    with pytest.raises(RedisWrongType):
        bench.do("delegate", fence=fence, **CHILD)
    assert not bench.redis.exists(bench.store.keys("children", "r1"))


def test_a_child_that_was_given_up_continues_if_its_parent_asks_for_it_again(bench: Bench) -> None:
    """One that somebody else has cancelled does not: its result says that it was cancelled."""
    fence = bench.claimed()
    bench.do("delegate", fence=fence, **CHILD)
    assert bench.do("cancel", run_id="r5", given_up_in=1).answer == "CANCELLED"
    assert bench.do("delegate", fence=fence, **CHILD).answer == "NEW"
    assert (bench.field("state", "r5"), bench.field("life", "r5")) == ("queued", "2")

    bench.do("cancel", run_id="r5")
    assert bench.do("delegate", fence=fence, **CHILD).answer == "ENDED"


def test_a_child_that_a_later_life_has_asked_for_is_not_given_up_by_an_earlier_one(bench: Bench) -> None:
    """The cancellation of an attempt that has died, or that was slow, comes late."""
    bench.do("delegate", fence=bench.claimed(), **CHILD)
    assert bench.do("cancel", run_id="r5", given_up_in=2).answer == "ALREADY"
    assert bench.field("state", "r5") == "queued"


def test_what_children_have_used_counts_in_the_result_of_a_parent_that_a_script_ends(bench: Bench) -> None:
    """Each once, with all of its numbers; not those in the background, and not what is no usage."""
    fence = bench.claimed()
    usage = {"llm_calls": 1, "cost_usd": 0.25, "cost_breakdown": {"input": 0.25}, "ttft_ms": 7.0}
    more = {"r6": "helper:bb:1", "r7": "helper:cc:1", "r8": "helper:dd:1"}
    bench.do("delegate", fence=fence, delegated='{"run_id":"r5"}', **CHILD)
    for child_id, call in more.items():
        ids = {"child_id": child_id, "session_id": f"child:{child_id}", "call": call}
        delegated = json.dumps({"run_id": child_id})
        bench.do("delegate", fence=fence, delegated=delegated, background=child_id == "r7", **ids)
    for child_id in ("r5", *more):
        text = "broken" if child_id == "r8" else json.dumps(usage)
        bench.redis.hset(bench.store.keys("run", child_id), "usage", text)
    bench.do("emit", fence=fence, batch_no=9, facts=["given_up:r5", "{}", "given_up:r6", "{}"])
    own = {"llm_calls": 2, "cost_usd": None, "cost_breakdown": {}}
    bench.redis.hset(bench.store.keys("run", "r1"), mapping={"usage": json.dumps(own)})

    bench.do("cancel", force=True)

    stored = json.loads(bench.field("usage_in_all", "r1"))
    assert stored == {"llm_calls": 4, "cost_usd": 0.5, "cost_breakdown": {"input": 0.5}}
    assert json.loads(bench.field("result", "r1"))["usage"] == stored
    assert json.loads(bench.field("usage", "r1")) == own
    bench.do("resume")
    assert bench.field("usage_in_all", "r1") is None
