"""The answers of the script by which a run creates its children."""

from __future__ import annotations

import json

import pytest

from openagents_worker.errors import RedisWrongType
from openagents_worker.store.formats import DELEGATES
from tests.store.test_scripts import Bench, bench

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


def test_a_child_in_the_background_outlives_the_record_of_its_parent(bench: Bench) -> None:
    """Its end removes it from the set of the parent."""
    fence = bench.claimed()
    bench.do("delegate", fence=fence, background=True, **CHILD)
    bench.do("finish", fence=fence)
    bench.redis.delete(bench.store.keys("run", "r1"))
    bench.do("cancel", run_id="r5")
    assert not bench.redis.exists(bench.store.keys("children", "r1"))


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
