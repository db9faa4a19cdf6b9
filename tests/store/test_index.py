"""The indexes of runs and sessions: they have all existing runs, and lose expired ones, under load, too."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Unpack

import pytest

from openagents_worker.jsontext import dumps
from openagents_worker.store import scripts
from openagents_worker.store.listing import RunFilter, RunFilters, list_runs
from tests.support.scripts import Hand

TTL_MS = 60_000
LABEL = "label=env=prod"


class Lists(Hand):
    """Runs and times that the test controls: a run that has ended is old immediately, and its record has
    expired."""

    def accept(self, run_id: str, session_id: str, label: str = LABEL) -> None:
        self.store.run(
            scripts.submit(
                run_id=run_id,
                agent_id="a",
                session_id=session_id,
                queue="",
                default_queue="agents",
                digest=run_id,
                uid="u",
                request=dumps({"agent_id": "a", "session_id": session_id, "input_text": "x"}),
                canvas="",
                durable=True,
                delay_ms=0,
                reject_if_busy=False,
                parent_run_id="",
                lists=[label],
            )
        )

    def grow_old(self, *ids: str, of: str) -> None:
        """As if the entries had been added long ago."""
        key = self.store.keys("index", of)
        self.store.redis.zadd(key, dict.fromkeys(ids, self.now_ms() - 2 * TTL_MS), xx=True)
        for id_ in ids:
            if self.store.redis.exists(record := self.store.keys("run", id_)):
                self.store.redis.hset(record, "created", 1)

    def expire(self, run_id: str, session_id: str) -> None:
        """The run was accepted long ago and has ended; it and its session have expired."""
        keys, redis = self.store.keys, self.store.redis
        self.store.run(scripts.cancel(run_id=run_id, reason="over", force=True))
        redis.delete(*(keys(kind, run_id) for kind in ("run", "events", "facts", "journal")))
        redis.delete(*(keys(kind, session_id) for kind in ("session", "session_queue")))
        for name in self.lists(session_id):
            self.grow_old(run_id, of=name)
        self.grow_old(session_id, of="sessions")

    @staticmethod
    def lists(session_id: str) -> list[str]:
        return ["all", "agent=a", f"session={session_id}", LABEL]

    def size(self, name: str) -> int:
        return int(self.store.redis.zcard(self.store.keys("index", name)))

    def now_ms(self) -> int:
        seconds, micros = self.store.redis.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def prune(self, limit: int) -> Any:
        return self.store.run(scripts.prune(limit=limit))

    def make_due(self) -> None:
        """As if every index were due now."""
        key = self.store.keys("indexes")
        self.store.redis.zadd(key, dict.fromkeys(self.store.redis.zrange(key, 0, -1), 1))


@pytest.fixture
def lists(redis_url: str) -> Generator[Lists]:
    with Lists(redis_url, run_ttl_ms=TTL_MS, session_ttl_ms=TTL_MS) as lists:
        yield lists


def test_an_index_does_not_grow_under_load(lists: Lists) -> None:
    """If as many runs expire as are accepted, each submission removes expired ones, without help of a
    worker."""
    for number in range(100):
        lists.accept(f"r{number}", "busy")
        lists.expire(f"r{number}", "busy")

        for name in (*lists.lists("busy"), "sessions"):
            assert lists.size(name) <= 5, f"{name} after {number} runs"


def test_a_long_index_shrinks_under_load(lists: Lists) -> None:
    """Faster than it grows. However long it is, a submission removes only a few entries."""
    key = lists.store.keys("index", "all")
    lists.store.redis.zadd(key, {f"gone{number}": 1000 + number for number in range(300)})
    sizes = [lists.size("all")]
    while sizes[-1] > 60:
        lists.accept(run_id := f"r{len(sizes)}", run_id)
        lists.expire(run_id, run_id)
        sizes.append(lists.size("all"))
        assert sizes[-2] - sizes[-1] < 10

    assert len(sizes) < 1_000


def test_long_lived_runs_do_not_keep_expired_runs_in_the_index(lists: Lists) -> None:
    """They are older than the others and still exist.

    Hardly more expired entries stay than there are such runs.
    """
    live = {f"live{number}": 1000 + number for number in range(50)}
    gone = {f"gone{number}": 2000 + number for number in range(200)}
    key = lists.store.keys("index", "all")
    lists.store.redis.zadd(key, {**live, **gone})
    for run_id in live:
        lists.accept(run_id, run_id)
        lists.grow_old(run_id, of="all")

    for number in range(3_000):
        if lists.size("all") < 120:
            break
        lists.accept(f"r{number}", f"s{number}")
        lists.expire(f"r{number}", f"s{number}")

    assert lists.size("all") < 120
    assert set(live) <= set(lists.store.redis.zrange(key, 0, -1))
    for run_id in live:
        lists.expire(run_id, run_id)


def test_one_prune_goes_through_many_indexes(lists: Lists) -> None:
    """Each session has its own index: if sessions are short, indexes expire as often as runs."""
    for number in range(200):
        lists.accept(f"r{number}", f"s{number}")
        lists.expire(f"r{number}", f"s{number}")
    lists.make_due()

    looks = 0
    while lists.prune(limit=500).looked:
        looks += 1

    assert looks <= 10
    assert lists.store.redis.keys("oa:index*") == []


def test_an_index_with_old_live_runs_is_pruned_again_in_time(lists: Lists) -> None:
    """A run may end right after a prune; its entry is removed at most one TTL after its record."""
    lists.accept("r1", "s1")
    for name in lists.lists("s1"):
        lists.grow_old("r1", of=name)
    lists.make_due()

    assert lists.prune(limit=500).removed == 0

    again = dict(lists.store.redis.zrange(lists.store.keys("indexes"), 0, -1, withscores=True))
    assert all(again[name] <= lists.now_ms() + TTL_MS for name in lists.lists("s1"))
    lists.expire("r1", "s1")


def test_a_run_is_not_in_the_lists_of_an_earlier_run_with_its_id(lists: Lists) -> None:
    """They are those of another session and label. No list shows it there, and a prune removes the entry."""
    lists.accept("r1", "s1")
    lists.expire("r1", "s1")
    lists.accept("r1", "s2", "label=env=test")

    assert listed(lists, session_id="s1") == listed(lists, labels={"env": "prod"}) == []
    assert listed(lists, session_id="s2") == listed(lists, labels={"env": "test"}) == listed(lists) == ["r1"]

    lists.make_due()
    while lists.prune(limit=500).looked:
        pass
    assert (lists.size("session=s1"), lists.size(LABEL)) == (0, 0)
    assert (lists.size("session=s2"), lists.size("label=env=test"), lists.size("all")) == (1, 1, 1)
    lists.expire("r1", "s2")


def listed(lists: Lists, **filters: Unpack[RunFilters]) -> list[str]:
    plan = list_runs(lists.store.keys, RunFilter.of(filters), limit=10, cursor=None)
    return [record.run_id for record in lists.store.execute(plan).items]


def test_entries_of_really_expired_runs_are_removed_under_load(redis_url: str) -> None:
    """With a real TTL of 20 ms, without a controlled clock."""
    with Lists(redis_url, run_ttl_ms=20, session_ttl_ms=20) as lists:
        number = 0
        while not number or lists.size("all") > number / 2:
            number += 1
            lists.accept(f"r{number}", "s1")
            lists.store.run(scripts.cancel(run_id=f"r{number}", reason="over", force=True))

        assert lists.size("session=s1") < number
