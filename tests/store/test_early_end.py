"""The scripts that end a lease before its time, one answer a test; the rest is as at any lease's end."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.store.test_scripts import HOUR_MS, Bench, woken

HERE = {"host": "boot one", "process": "11 500"}


@pytest.fixture
def bench(redis_url: str) -> Generator[Bench]:
    with Bench(redis_url) as bench:
        yield bench


# --- neighbours ------------------------------------------------------------------------------------------


def test_a_worker_learns_who_else_is_on_its_host(bench: Bench) -> None:
    """With its registration and with every beat, so that looking at them costs no command of its own."""
    bench.do("register", incarnation="w2", host="boot one", process="12 600")
    bench.do("register", incarnation="w3", host="boot two", process="12 600")

    registered = bench.do("register", incarnation="w4", **HERE)
    bench.do("register", incarnation="w5", host="boot one", process="13 700")

    assert registered.neighbours == {"w2": "12 600", "w4": "11 500"}
    assert bench.do("renew", incarnation="w4", host="boot one").neighbours == {
        "w2": "12 600",
        "w4": "11 500",
        "w5": "13 700",
    }


def test_a_worker_that_does_not_say_where_it_is_is_nobodys_neighbour(bench: Bench) -> None:
    """As a worker of an earlier version: it is left to its lease."""
    bench.do("register", incarnation="w2", **HERE)

    assert bench.do("renew").neighbours == {}
    assert bench.do("renew", incarnation="w2", host="boot one").neighbours == {"w2": "11 500"}
    assert bench.do("end_lease", incarnation="w1", host="", process="") == "OVER"


def test_who_holds_no_lease_is_no_neighbour_any_more(bench: Bench) -> None:
    """Retired, reclaimed by whomever, or over: there is nothing to end."""
    for incarnation in ("retired", "reclaimed", "over", "w2"):
        bench.do("register", incarnation=incarnation, **HERE)
    bench.do("retire", incarnation="retired", host="boot one")
    bench.redis.zrem(bench.store.keys("workers"), "reclaimed")  # by a worker that knows nothing of hosts
    bench.lab.end_lease("over")

    assert bench.do("renew", incarnation="w2", host="boot one").neighbours == {"w2": "11 500"}
    assert set(bench.redis.hkeys(bench.store.keys("host", "boot one"))) == {"over", "w2"}


def test_the_lease_of_a_dead_process_ends_at_once(bench: Bench) -> None:
    """OK: its runs are there for reclaim, and count as recovered from a worker that is gone."""
    bench.do("register", incarnation="dead", lease_ms=HOUR_MS, **HERE)
    bench.do("submit")
    bench.claim("r1", "dead")

    assert bench.do("end_lease", incarnation="dead", **HERE) == "OK"

    assert bench.do("renew", incarnation="dead").lost
    reclaimed = bench.do("reclaim")
    assert (reclaimed.incarnation, woken(reclaimed.wakes)) == ("dead", ["r1"])
    assert (bench.field("recoveries"), bench.field("stuck")) == ("1", "1")


def test_several_neighbours_end_one_lease_once(bench: Bench) -> None:
    """OVER: each of them has seen the death."""
    bench.do("register", incarnation="dead", **HERE)

    assert [bench.do("end_lease", incarnation="dead", **HERE) for _ in range(3)] == ["OK", "OVER", "OVER"]
    deadline = bench.score("workers", "dead")
    bench.do("end_lease", incarnation="dead", **HERE)
    assert bench.score("workers", "dead") == deadline


@pytest.mark.parametrize(
    "other", [{"host": "boot two"}, {"process": "11 501"}, {"incarnation": "w1"}, {"incarnation": "nobody"}]
)
def test_nobody_ends_a_lease_of_whom_they_have_seen_nothing(bench: Bench, other: dict[str, str]) -> None:
    """OVER: another host, another process, another incarnation."""
    bench.do("register", incarnation="w2", **HERE)

    assert bench.do("end_lease", **{"incarnation": "w2", **HERE, **other}) == "OVER"

    assert not bench.do("renew", incarnation="w2", host="boot one").lost
    assert not bench.do("renew").lost
