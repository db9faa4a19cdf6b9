"""A Redis that refuses writes because its memory is full: a script is carried out, or it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest
from redis import ResponseError

from openagents_worker.errors import OpenAgentsError
from tests.store.test_scripts import Bench


@pytest.fixture
def bench(redis_url: str) -> Generator[Bench]:
    with Bench(redis_url) as bench:
        yield bench


@contextmanager
def full(bench: Bench) -> Generator[None]:
    bench.redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        bench.redis.config_set("maxmemory", 0)


def counters(bench: Bench) -> dict[str, dict[str, str]]:
    """The fields of all hashes that are whole numbers."""
    hashes = [key for key in bench.redis.scan_iter("oa:*") if bench.redis.type(key) == "hash"]
    return {
        key: {name: value for name, value in bench.redis.hgetall(key).items() if value.isdecimal()}
        for key in hashes
    }


def send(bench: Bench) -> None:
    bench.do("fact", run_id="r1", value='"next"')


def steer(bench: Bench) -> None:
    bench.do("fact", run_id="r1", name="steer:", value='{"text":"next"}')


def submit(bench: Bench) -> None:
    bench.do("submit", run_id="r4")


def interrupt(bench: Bench) -> None:
    bench.do("submit", run_id="r4", interrupts="interrupt")


def resend(bench: Bench) -> None:
    bench.do("resend", queue="q")


@pytest.mark.parametrize("act", [send, steer, submit, interrupt, resend])
def test_no_counter_begins_again_in_a_full_redis(bench: Bench, act: Callable[[Bench], None]) -> None:
    """A counter that began again would give two values of a run the same number: the later one replaces the
    earlier one, which was accepted."""
    bench.claimed("r1")
    bench.do("submit", run_id="r2", interrupts="interrupt")
    for _ in range(3):
        bench.do("fact", run_id="r1", value='"before"')
    bench.do("submit", run_id="r5", session_id="s5")
    bench.do("resend", queue="q")
    before = counters(bench)

    with full(bench), pytest.raises((OpenAgentsError, ResponseError)):
        act(bench)

    assert counters(bench) == before


def test_a_value_that_is_sent_to_a_full_redis_replaces_no_earlier_one(bench: Bench) -> None:
    bench.do("submit", run_id="r1")
    send(bench)
    with full(bench), pytest.raises((OpenAgentsError, ResponseError)):
        send(bench)

    send(bench)

    assert sorted(bench.redis.hkeys(bench.store.keys("facts", "r1"))) == ["signal:paid:1", "signal:paid:2"]


def test_a_counter_that_is_not_a_number_counts_as_zero(bench: Bench) -> None:
    bench.do("submit", run_id="r1")
    bench.redis.hset(bench.store.keys("run", "r1"), "facts_no", "many")

    send(bench)

    assert bench.field("facts_no") == "1"
