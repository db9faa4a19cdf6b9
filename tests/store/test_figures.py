"""The figures of the fleet: what is counted, in how many commands, and what a scrape gets without Redis."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from openagents_worker.models import WaitKind
from openagents_worker.store.client import Cell, Store
from openagents_worker.store.figures import MAX_QUEUES, Figures, read_figures
from openagents_worker.store.fleet_samples import FleetSamples
from openagents_worker.store.parking import Wait
from openagents_worker.store.roles import RoleName
from tests.access.users import PASSWORD, acl_words
from tests.support.scripts import Hand


@pytest.fixture
def hand(redis_url: str) -> Generator[Hand]:
    with Hand(redis_url) as hand:
        hand.register()
        yield hand


def figures(redis_url: str) -> Figures:
    store = Store(Cell(redis_url), max_connections=1)
    try:
        return store.execute(read_figures(store.keys, "agents"))
    finally:
        store.close()


def test_runs_are_counted_by_what_they_wait_for(hand: Hand, redis_url: str) -> None:
    """Runs that work, that wait for a worker, for a time, and in the queue of the agent."""
    for run_id in ("works", "waits", "retried", "parked"):
        hand.submit(run_id, session_id=run_id)
    for run_id in ("works", "retried", "parked"):
        hand.claim(run_id)
    hand.retry("retried")
    hand.park("parked", Wait(WaitKind.SIGNAL, "paid", until_ms=4_000_000_000_000, fact="signal:paid:"))
    found = figures(redis_url)

    assert (found.running, found.due, found.timeouts, found.approvals) == (1, 1, 1, 0)
    [queue] = [queue for queue in found.queues if queue.waiting]
    assert (queue.name, queue.waiting, queue.workers) == ("agents", 1, 0)
    assert queue.oldest_age_ms >= 0


def test_the_number_of_commands_does_not_grow_with_the_runs(hand: Hand, redis_url: str) -> None:
    """No key is scanned, and of each queue only the oldest messages are read."""
    store = Store(Cell(redis_url), max_connections=1)
    counts = []
    for runs in (30, 60):
        for number in range(runs):
            hand.submit(f"{runs}-{number}", session_id=f"{runs}-{number}")
        before = store.ask(lambda r: r.info("commandstats"))
        store.execute(read_figures(store.keys, "agents"))
        after = store.ask(lambda r: r.info("commandstats"))
        counts.append(sum(_calls(after).values()) - sum(_calls(before).values()))
        assert after.get("cmdstat_scan") == before.get("cmdstat_scan")
    store.close()

    assert counts[0] == counts[1] < 60


def _calls(stats: Any) -> dict[str, int]:
    return {name: int(stat["calls"]) for name, stat in stats.items()}


def test_the_number_of_queues_is_bounded(hand: Hand, redis_url: str) -> None:
    """Whatever agents were announced. An announcement that is not valid is left out."""
    store = Store(Cell(redis_url), max_connections=1)
    agents = {f"a{number}": f'{{"queue":"q{number:04}"}}' for number in range(MAX_QUEUES + 50)}
    store.ask(lambda r: r.hset(store.keys("agents"), mapping={**agents, "bad": "[1", "worse": "7"}))
    store.close()

    assert len(figures(redis_url).queues) == MAX_QUEUES


@pytest.mark.parametrize("score", ["-inf", "inf", -5, 1e17])
def test_an_invalid_score_hides_no_figures(hand: Hand, redis_url: str, score: float | str) -> None:
    """Times before and after all valid times, which another program may have stored."""
    store = Store(Cell(redis_url), max_connections=1)
    store.redis.zadd(store.keys("sent", "agents"), {"nobody": score})
    store.close()

    [queue] = figures(redis_url).queues

    assert (queue.waiting, queue.oldest_age_ms >= 0) == (1, True)


def test_a_scrape_without_redis_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged once, and the other samples are missing."""
    times = iter([0.0, 0.0, 0.0, 10.0, 10.0, 10.0])  # the second read is after the samples are too old
    samples = FleetSamples(Cell("redis://127.0.0.1:1/0"), "agents", clock=lambda: next(times))

    for _ in range(2):
        assert [tuple(sample) for sample in samples()] == [("openagents_fleet_up", False, ())]
    samples.close()

    assert caplog.text.count("metrics.fleet_not_read") == 1


def test_two_scrapes_within_seconds_read_once(hand: Hand, redis_url: str) -> None:
    """Several servers may scrape the same process."""
    now_s = 0.0
    samples = FleetSamples(Cell(redis_url), "agents", clock=lambda: now_s)

    def waiting() -> float:
        return next(s.value for s in samples() if s.name == "openagents_queue_runs")

    assert waiting() == 0
    hand.submit("r1", session_id="s1")
    assert waiting() == 0
    now_s = 6.0
    assert waiting() == 1
    samples.close()


def test_ended_runs_do_not_wait(hand: Hand, redis_url: str) -> None:
    """A run that has ended stays in `sent` until Celery is notified. A user that may read runs sees that."""
    hand.end("done", steps=0, tell=True)
    hand.submit("waits", session_id="s2")

    assert _waiting(figures(redis_url)) == 1


def test_a_user_that_may_not_read_runs_is_refused_once(hand: Hand, redis_url: str) -> None:
    """Flower's user: ended runs count as waiting, and only the first scrape is in the ACL log of Redis."""
    for run_id in ("r1", "r2", "r3"):
        hand.end(run_id, steps=0, tell=True)
    with redis.Redis.from_url(redis_url, decode_responses=True) as admin, _user(admin) as user:
        now_s = 0.0
        samples = FleetSamples(
            Cell(redis_url.replace("//", f"//{user}:{PASSWORD}@")), "agents", clock=lambda: now_s
        )
        for _ in range(3):
            assert [s.value for s in samples() if s.name == "openagents_queue_runs"] == [3]
            now_s += 60.0
        samples.close()
        refused = [(one["object"], one["count"]) for one in admin.acl_log() if one["username"] == user]

    assert refused == [("oa:run:r1", 1)]


def _waiting(found: Figures) -> int:
    return sum(queue.waiting for queue in found.queues)


@contextmanager
def _user(admin: Any) -> Generator[str]:
    """The user of Flower, with the rights of its ACL file."""
    user, *words = acl_words(RoleName.FLOWER)
    admin.execute_command("ACL", "SETUSER", user, "reset", *words)
    admin.acl_log_reset()
    try:
        yield user
    finally:
        admin.acl_deluser(user)
        admin.acl_log_reset()
