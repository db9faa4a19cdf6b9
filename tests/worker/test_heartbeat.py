"""The heartbeat: it registers, renews, and corrects differences between Redis and the process."""

from __future__ import annotations

import threading

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.store import scripts
from openagents_worker.store.client import Cell, Store
from openagents_worker.store.part_health import DATA_LOST
from openagents_worker.store.scripts import Wake
from openagents_worker.worker.heartbeat import Heartbeat
from openagents_worker.worker.loop_thread import LoopThread
from tests.support.scripts import Hand
from tests.support.waiting import wait_for
from tests.worker.conftest import LEASE_MS, StartHeartbeat
from tests.worker.run_host import RecordingRunHost


def registered(heartbeat: Heartbeat) -> str:
    assert heartbeat.wait_registered(5)
    return heartbeat.lease.incarnation


def deadline(store: Store, incarnation: str) -> float | None:
    score: float | None = store.ask(lambda r: r.zscore(store.keys("workers"), incarnation))
    return score


def owned_by(hand: Hand, heartbeat: Heartbeat, run_id: str) -> None:
    """Make Redis assign a new run to this heartbeat's process."""
    hand.incarnation, own = registered(heartbeat), hand.incarnation
    hand.submit(run_id)
    hand.claim(run_id)
    hand.incarnation = own


def test_a_worker_registers_with_its_agents_and_is_renewed(
    start_heartbeat: StartHeartbeat, hand: Hand
) -> None:
    """The lease lasts as long as the heartbeat renews it; producers can read the agents."""
    heartbeat = start_heartbeat()
    incarnation = registered(heartbeat)
    first = deadline(hand.store, incarnation)

    wait_for(lambda: deadline(hand.store, incarnation) != first, "the lease was renewed")

    assert incarnation.startswith("w1@test:")
    assert hand.store.ask(lambda r: r.hkeys(hand.store.keys("agents"))) == ["assistant"]
    assert 0 < heartbeat.lease.remaining_s() < LEASE_MS / 1000


@pytest.mark.parametrize("is_data_lost", [True, False], ids=["all data", "the lease only"])
def test_a_redis_that_has_lost_its_data_is_reported(
    start_heartbeat: StartHeartbeat, hand: Hand, is_data_lost: bool
) -> None:
    """All runs are gone then. The end of a lease alone is another case: the runs continue elsewhere."""
    heartbeat = start_heartbeat()
    first = registered(heartbeat)

    hand.store.ask(lambda r: r.flushall() if is_data_lost else r.zrem(hand.store.keys("workers"), first))

    wait_for(lambda: heartbeat.lease.incarnation != first, "the worker has registered again")
    wait_for(lambda: heartbeat.health.report().failing_s is None, "its lease is renewed")
    code = heartbeat.health.report().error_code
    assert code == (DATA_LOST if is_data_lost else "worker.lease_lost")


def test_an_owned_run_that_is_not_executed_is_released(
    start_heartbeat: StartHeartbeat, hand: Hand, sent: list[Wake]
) -> None:
    """A claim with a lost reply leaves such a run; it is woken again within two beats."""
    owned_by(hand, start_heartbeat(), "r1")

    wait_for(lambda: [wake.run_id for wake in sent] == ["r1"], "the run was released and its wake-up sent")

    assert hand.store.ask(lambda r: r.hget(hand.store.keys("run", "r1"), "state")) == "queued"


def test_a_run_that_is_executed_is_not_released(
    start_heartbeat: StartHeartbeat, hand: Hand, run_host: RecordingRunHost, sent: list[Wake]
) -> None:
    """It is owned and known, so there is no difference."""
    run_host.known_runs.add("r1")
    heartbeat = start_heartbeat()
    owned_by(hand, heartbeat, "r1")
    first = deadline(hand.store, heartbeat.lease.incarnation)
    beats: set[float | None] = {first}

    def four_beats() -> bool:
        beats.add(deadline(hand.store, heartbeat.lease.incarnation))
        return len(beats) > 4

    wait_for(four_beats, "four renewals were made")

    assert sent == []
    assert run_host.latched == []


def test_a_run_of_another_worker_is_stopped_here(
    start_heartbeat: StartHeartbeat, run_host: RecordingRunHost
) -> None:
    """Its writes are fenced; its calls must end too."""
    run_host.known_runs.add("gone")

    start_heartbeat()

    wait_for(lambda: ("gone", LatchReason.FENCED) in run_host.latched, "the run was latched")


def test_a_missed_cancel_request_arrives_with_a_heartbeat(
    start_heartbeat: StartHeartbeat, hand: Hand, run_host: RecordingRunHost
) -> None:
    """Pub/sub may lose a message; the request is also stored in Redis."""
    run_host.known_runs.add("r1")
    owned_by(hand, start_heartbeat(), "r1")

    hand.store.run(scripts.cancel(run_id="r1", reason="enough", force=False))

    wait_for(lambda: ("r1", LatchReason.CANCELLED) in run_host.latched, "the run was latched")


def test_all_runs_stop_before_a_new_incarnation_registers(
    start_heartbeat: StartHeartbeat, hand: Hand, run_host: RecordingRunHost
) -> None:
    """A lease ends for ever: the worker registers a new incarnation without runs."""
    run_host.stop_allowed.clear()
    heartbeat = start_heartbeat()
    first = registered(heartbeat)

    hand.store.ask(lambda r: r.zrem(hand.store.keys("workers"), first))
    wait_for(lambda: run_host.all_latched == [LatchReason.FENCED], "all runs were latched")
    still = heartbeat.lease.incarnation
    heartbeat._loop.call_soon_threadsafe(run_host.stop_allowed.set)

    wait_for(lambda: heartbeat.lease.incarnation != first, "a new incarnation registered")
    assert still == first
    assert heartbeat.lease.remaining_s() > 0
    answered = hand.store.ask(lambda r: r.hget(hand.store.keys("lease_end", first), "answered"))
    assert answered == "1", "the new incarnation reports that the old one did not die"


def test_a_worker_without_redis_stops_its_runs_before_its_lease_ends(
    start_heartbeat: StartHeartbeat, run_host: RecordingRunHost, loop_thread: LoopThread
) -> None:
    """It knows by its own clock when other workers may take its runs."""
    with EmbeddedRedis() as redis:
        heartbeat = start_heartbeat(Cell(redis.url))
        registered(heartbeat)
        lease = heartbeat.lease

    wait_for(lambda: run_host.all_latched == [LatchReason.FENCED], "all runs were latched")

    wait_for(lease.runs_stopped.is_set, "all runs have stopped")
    assert lease.remaining_s() == 0


def test_a_worker_waits_for_a_redis_that_is_not_there_yet(start_heartbeat: StartHeartbeat) -> None:
    """The start order does not matter."""
    with EmbeddedRedis() as first:
        url, port = first.url, first.port
    heartbeat = start_heartbeat(Cell(url))
    assert not heartbeat.wait_registered(0.3)

    with EmbeddedRedis(port=port):
        assert heartbeat.wait_registered(10)
        heartbeat.stop()


def test_a_worker_that_retires_leaves_no_lease(start_heartbeat: StartHeartbeat, hand: Hand) -> None:
    """No worker has to wait for the expiry of its lease."""
    heartbeat = start_heartbeat()
    incarnation = registered(heartbeat)

    heartbeat.stop()

    assert not heartbeat.has_left_runs
    assert deadline(hand.store, incarnation) is None
    assert heartbeat.lease.remaining_s() == 0


@pytest.mark.allow_blocking(reason="the test blocks the loop on purpose")
def test_a_busy_loop_does_not_delay_the_heartbeat(
    start_heartbeat: StartHeartbeat, hand: Hand, loop_thread: LoopThread
) -> None:
    """A run with a long computation does not cost other runs their worker."""
    heartbeat = start_heartbeat()
    incarnation = registered(heartbeat)
    free = threading.Event()
    loop_thread.loop.call_soon_threadsafe(free.wait)
    first = deadline(hand.store, incarnation)

    try:
        wait_for(
            lambda: deadline(hand.store, incarnation) != first,
            "the lease is renewed while the loop is blocked",
        )
    finally:
        free.set()
