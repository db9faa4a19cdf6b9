"""The scripts of the limits of the fleet: requests and tokens per minute, concurrency, turns of tenants.

Times are those of Redis, so every span of a test is a minute or an hour: no test depends on its own speed.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.store.limited_fleet import HOUR_MS, Fleet
from tests.store.test_scripts import Bench

MINUTE_MS = 60_000
ONE_A_MINUTE = {"requests_per_minute": 1}


@pytest.fixture
def bench(redis_url: str) -> Generator[Bench]:
    with Bench(redis_url) as bench:
        yield bench


# --- requests ---


def test_requests_are_spread_over_a_minute(bench: Bench) -> None:
    """An idle limit lets a quarter of a second's requests through at once, not a whole minute's."""
    fleet = Fleet(bench, requests_per_minute=60)

    taken = [fleet.take("r1", call=f"c{number}", wait_ms=MINUTE_MS) for number in range(40)]

    delays = [each.delay_ms for each in taken]
    assert {each.answer for each in taken} == {"OK"}
    assert delays[0] == 0
    assert delays == sorted(delays)
    assert 30_000 < delays[-1] <= 38_750


def test_a_request_that_must_wait_for_longer_than_a_call_waits_reserves_nothing(bench: Bench) -> None:
    fleet = Fleet(bench, **ONE_A_MINUTE)

    answers = [fleet.take(run_id).answer for run_id in ("r1", "r2", "r2", "r2")]
    fleet.schedule(MINUTE_MS)

    assert answers == ["OK", "LATER", "LATER", "LATER"]
    assert fleet.take("r2").answer == "OK"


def test_a_repeated_request_is_reserved_once(bench: Bench) -> None:
    """Its answer was lost, and the same command is sent again."""
    fleet = Fleet(bench, max_concurrency=2, **ONE_A_MINUTE)

    answers = [fleet.take("r1").answer for _ in range(3)]
    fleet.schedule(MINUTE_MS)

    assert answers == ["OK"] * 3
    assert fleet.take("r2").answer == "OK"


def test_a_request_that_was_not_sent_is_given_back_once(bench: Bench) -> None:
    fleet = Fleet(bench, **ONE_A_MINUTE)
    fleet.take("r1")
    fleet.take("r2", wait_ms=HOUR_MS)  # its time is in a minute

    for _ in range(2):
        fleet.settle("r2", was_sent=False)
    delays = [fleet.take(run_id, wait_ms=HOUR_MS).delay_ms for run_id in ("r3", "r4")]

    assert 50_000 < delays[0] <= MINUTE_MS < delays[1]


def test_a_request_that_was_not_sent_in_time_is_lost(bench: Bench) -> None:
    """Given back later, it would come in addition to those of its new time."""
    fleet = Fleet(bench, **ONE_A_MINUTE)
    fleet.take("r1")

    fleet.settle("r1", was_sent=False)

    assert fleet.take("r2").answer == "LATER"


def test_only_the_owner_of_a_run_reserves_requests(bench: Bench) -> None:
    fleet = Fleet(bench, **ONE_A_MINUTE)
    fleet.start("r1")
    fleet.fences["r1"] = "7:other"

    assert fleet.take("r1").answer == "FENCED"
    assert fleet.take("r2").answer == "OK"


# --- tokens ---


def test_tokens_are_reserved_and_settled(bench: Bench) -> None:
    """A call that used fewer tokens than were reserved gives the difference back."""
    fleet = Fleet(bench, tokens_per_minute=1_000)

    first = fleet.take("r1", tokens=2_000)
    while_reserved = fleet.take("r2", tokens=10)
    fleet.settle("r1", tokens=2_000, used=1)
    fleet.settle("r1", tokens=2_000, used=1)  # repeated

    assert (first.answer, while_reserved.answer) == ("OK", "LATER")
    assert 115_000 < while_reserved.delay_ms <= 120_000
    assert fleet.take("r2", tokens=1_000).answer == "OK"
    assert fleet.take("r3", tokens=10).answer == "LATER"


def test_a_call_with_more_tokens_than_a_minute_allows_is_served(bench: Bench) -> None:
    fleet = Fleet(bench, tokens_per_minute=10)

    assert fleet.take("r1", tokens=1_000_000).answer == "OK"
    assert fleet.take("r2", tokens=1).delay_ms <= HOUR_MS


# --- concurrency ---


def test_concurrent_requests_are_limited(bench: Bench) -> None:
    fleet = Fleet(bench, max_concurrency=2)

    answers = [fleet.take(run_id).answer for run_id in ("r1", "r2", "r3")]
    fleet.settle("r1")

    assert answers == ["OK", "OK", "BUSY"]
    assert fleet.take("r3").answer == "OK"


@pytest.mark.parametrize("end", ["reclaimed", "suspended", "cancelled"])
def test_the_share_of_an_attempt_that_has_ended_comes_back(bench: Bench, end: str) -> None:
    """Its worker died, or could not say that the request had ended."""
    fleet = Fleet(bench, max_concurrency=1)
    fleet.take("r1")
    bench.do("register", incarnation="w2")
    fleet.fences["r2"] = _claimed_by_second_worker(bench)
    busy = fleet.take("r2").answer

    if end == "reclaimed":
        bench.lab.end_lease("w1")
        bench.do("reclaim")
    elif end == "suspended":
        bench.do("suspend", fence=fleet.fences["r1"])
    else:
        bench.do("cancel", force=True)

    assert busy == "BUSY"
    assert fleet.take("r2").answer == "OK"


def test_requests_of_an_attempt_that_has_ended_are_not_in_use(bench: Bench) -> None:
    """Also without a limit of concurrent requests: lists show how many are in use."""
    fleet = Fleet(bench, requests_per_minute=6_000)
    fleet.take("r1")
    fleet.take("r2")
    calls = bench.store.keys("limit_calls", "k")

    bench.do("cancel", force=True)
    assert bench.redis.zcard(calls) == 2
    fleet.take("r3", may_park=False, wait_ms=MINUTE_MS)

    assert {id_.rpartition(" ")[2] for id_ in bench.redis.zrange(calls, 0, -1)} == {"r2", "r3"}


def _claimed_by_second_worker(bench: Bench) -> str:
    bench.do("submit", run_id="r2", session_id="r2")
    return bench.claim("r2", "w2")


# --- runs that wait ---


def test_a_parked_run_is_called_when_a_request_ends(bench: Bench) -> None:
    fleet = Fleet(bench, max_concurrency=1)
    fleet.take("r1")
    parked = fleet.park("r2")

    called = fleet.settle("r1")
    fleet.again("r2")

    assert (parked, called) == ([], ["r2"])
    assert fleet.take("r2").answer == "OK"


def test_a_run_that_is_parked_just_after_a_request_has_ended_is_called_at_once(bench: Bench) -> None:
    fleet = Fleet(bench, max_concurrency=1)
    fleet.take("r1")
    assert fleet.take("r2").answer == "BUSY"
    fleet.settle("r1")

    assert fleet.park("r2") == ["r2"]


def test_a_parked_run_is_called_if_no_request_begins_or_ends(bench: Bench) -> None:
    fleet = Fleet(bench, **ONE_A_MINUTE)
    fleet.take("r1")
    fleet.park("r2")

    too_early = fleet.serve()
    fleet.schedule(MINUTE_MS)

    assert (too_early, fleet.serve(), fleet.serve()) == ([], ["r2"], [])


def test_parking_does_not_count_as_a_retry(bench: Bench) -> None:
    fleet = Fleet(bench, max_concurrency=1)
    fleet.take("r1")
    fleet.park("r2")
    fleet.settle("r1")

    claimed = bench.do("claim", run_id="r2")

    assert (claimed.answer, claimed.retries) == ("CLAIMED", 0)


def test_a_new_request_does_not_get_ahead_of_runs_that_wait(bench: Bench) -> None:
    fleet = Fleet(bench, max_concurrency=1)
    fleet.take("r1")
    fleet.park("r2")
    called = fleet.settle("r1")

    new = fleet.take("r3").answer
    fleet.again("r2")

    assert (called, new) == (["r2"], "BUSY")
    assert fleet.take("r2").answer == "OK"


def test_a_run_that_cannot_be_parked_does_not_wait_for_others(bench: Bench) -> None:
    fleet = Fleet(bench, max_concurrency=2)
    for run_id in ("r1", "r2"):
        fleet.take(run_id)
    fleet.park("r3")
    fleet.settle("r1")

    assert fleet.take("r4", may_park=False).answer == "OK"


def test_tenants_are_served_in_turn(bench: Bench) -> None:
    """One tenant has filled the queue before the other one comes."""
    fleet = Fleet(bench, max_concurrency=1)
    fleet.take("r1")
    for run_id in ("r2", "r3", "r4", "r5"):
        fleet.park(run_id, tenant="a")
    for run_id in ("r6", "r7"):
        fleet.park(run_id, tenant="b")

    served = []
    holder = "r1"
    while called := fleet.settle(holder):
        [holder] = called
        fleet.again(holder)
        assert fleet.take(holder).answer == "OK"
        served.append(holder)

    assert sorted(served[:4]) == ["r2", "r3", "r6", "r7"]
    assert served[4:] == ["r4", "r5"]


def test_a_run_that_waits_keeps_its_place(bench: Bench) -> None:
    """It was woken because its time was over, not because it was called."""
    fleet = Fleet(bench, max_concurrency=1)
    fleet.take("r1")
    fleet.park("r2")
    fleet.park("r3")
    fleet.time_out("r2")

    fleet.again("r2")
    answer = fleet.take("r2").answer
    fleet.park("r2")

    assert answer == "LATER"
    assert fleet.queue == ["r2", "r3"]


def test_a_run_that_was_called_in_vain_gets_the_first_place(bench: Bench) -> None:
    """The provider asked for a pause in the meantime."""
    fleet = Fleet(bench, max_concurrency=1)
    fleet.take("r1")
    fleet.park("r2")
    fleet.park("r3")
    assert fleet.settle("r1", blocked_ms=0) == ["r2"]
    fleet.settle("r1", blocked_ms=MINUTE_MS)

    fleet.again("r2")
    answer = fleet.take("r2").answer
    fleet.park("r2")

    assert answer == "LATER"
    assert fleet.queue == ["r2", "r3"]


def test_a_run_that_does_not_wait_any_more_is_not_called(bench: Bench) -> None:
    """It was cancelled, or another attempt was suspended for another reason meanwhile."""
    fleet = Fleet(bench, max_concurrency=1)
    fleet.take("r1")
    for run_id in ("r2", "r3", "r4"):
        fleet.park(run_id)
    bench.do("cancel", run_id="r2")
    fleet.time_out("r3")
    fleet.again("r3")
    bench.do("suspend", run_id="r3", fence=fleet.fences["r3"])

    assert fleet.settle("r1") == ["r4"]
    assert bench.field("state", "r3") == "retrying"


# --- Retry-After ---


def test_a_pause_that_a_provider_asks_for_holds_for_all(bench: Bench) -> None:
    fleet = Fleet(bench, requests_per_minute=600)
    fleet.take("r1")

    fleet.settle("r1", used=0, blocked_ms=30_000)
    paused = fleet.take("r2")
    fleet.settle("r1", blocked_ms=1_000)  # a shorter pause does not end a longer one
    fleet.schedule(30_000)

    assert paused.answer == "LATER"
    assert 25_000 < paused.delay_ms <= 30_000
    assert fleet.take("r2").answer == "OK"


def test_what_dead_workers_and_cancelled_runs_leave_is_removed_some_day(bench: Bench) -> None:
    """Also if there are too many of them to examine each."""
    fleet = Fleet(bench, requests_per_minute=600)
    fleet.take("r1")
    calls, called = (bench.store.keys(kind, "k") for kind in ("limit_calls", "limit_called"))
    bench.redis.zadd(calls, {"1:n c gone": 1})
    bench.redis.zadd(called, {"gone": 1})

    fleet.park("r2")
    fleet.take("r3", may_park=False)

    assert bench.redis.zscore(calls, "1:n c gone") is None
    assert bench.redis.zscore(called, "gone") is None


def test_the_keys_of_a_limit_expire(bench: Bench) -> None:
    """The fixture finds keys without a time to live; this test writes all of them."""
    fleet = Fleet(bench, max_concurrency=1, requests_per_minute=600, tokens_per_minute=1_000_000)
    fleet.take("r1")
    for run_id in ("r2", "r3"):
        fleet.park(run_id, tenant=run_id)
    fleet.settle("r1", used=5, blocked_ms=1)

    kinds = ("limits", "limit", "limit_queue", "limit_tenants", "limit_called")
    keys = [bench.store.keys(kind, *(["k"] if kind != "limits" else [])) for kind in kinds]
    assert [key for key in keys if bench.redis.pttl(key) <= 0] == []
