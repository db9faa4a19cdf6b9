"""The heartbeat: registers, renews, and sets right what Redis and the process see differently."""

from __future__ import annotations

import threading

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.store import scripts
from openagents_worker.store.client import Cell, Store
from openagents_worker.store.scripts import Wake
from openagents_worker.worker.heartbeat import Heartbeat
from openagents_worker.worker.loop_thread import LoopThread
from tests.producer.hand import Hand
from tests.waiting import wait_for
from tests.worker.conftest import LEASE_MS, StartHeartbeat
from tests.worker.run_host import NotingCarrier


def registered(heartbeat: Heartbeat) -> str:
    assert heartbeat.wait_registered(5)
    return heartbeat.lease.incarnation


def deadline(store: Store, incarnation: str) -> float | None:
    score: float | None = store.ask(lambda r: r.zscore(store.keys("workers"), incarnation))
    return score


def owned_by(hand: Hand, heartbeat: Heartbeat, run_id: str) -> None:
    """The run is Redis's idea of what this heartbeat's process runs."""
    hand.incarnation, own = registered(heartbeat), hand.incarnation
    hand.submit(run_id)
    hand.claim(run_id)
    hand.incarnation = own


def test_a_worker_registers_with_its_agents_and_is_renewed(
    start_heartbeat: StartHeartbeat, hand: Hand
) -> None:
    """The lease goes on for as long as the heart beats; producers learn which agents there are."""
    heartbeat = start_heartbeat()
    incarnation = registered(heartbeat)
    first = deadline(hand.store, incarnation)

    wait_for(lambda: deadline(hand.store, incarnation) != first, "the lease was renewed")

    assert incarnation.startswith("w1@test:")
    assert hand.store.ask(lambda r: r.hkeys(hand.store.keys("agents"))) == ["assistant"]
    assert 0 < heartbeat.lease.remaining_s() < LEASE_MS / 1000


def test_a_run_that_is_ours_and_that_nobody_runs_is_given_back(
    start_heartbeat: StartHeartbeat, hand: Hand, sent: list[Wake]
) -> None:
    """A claim whose answer was lost leaves such a run; it is woken again within two beats."""
    owned_by(hand, start_heartbeat(), "r1")

    wait_for(lambda: [wake.run_id for wake in sent] == ["r1"], "the run was released and its wake-up sent")

    assert hand.store.ask(lambda r: r.hget(hand.store.keys("run", "r1"), "state")) == "queued"


def test_a_run_that_is_being_carried_is_left_alone(
    start_heartbeat: StartHeartbeat, hand: Hand, run_host: NotingCarrier, sent: list[Wake]
) -> None:
    """Owned and known: nothing is wrong with it."""
    run_host.known_runs.add("r1")
    heartbeat = start_heartbeat()
    owned_by(hand, heartbeat, "r1")
    first = deadline(hand.store, heartbeat.lease.incarnation)
    beats: set[float | None] = {first}

    def four_beats() -> bool:
        beats.add(deadline(hand.store, heartbeat.lease.incarnation))
        return len(beats) > 4

    wait_for(four_beats, "the heart has beaten four times")

    assert sent == []
    assert run_host.latched == []


def test_a_run_that_somebody_else_has_is_stopped_here(
    start_heartbeat: StartHeartbeat, run_host: NotingCarrier
) -> None:
    """It can write nothing any more; its calls should end, too."""
    run_host.known_runs.add("gone")

    start_heartbeat()

    wait_for(lambda: ("gone", LatchReason.FENCED) in run_host.latched, "the run was latched")


def test_a_cancel_that_nobody_heard_of_comes_with_a_beat(
    start_heartbeat: StartHeartbeat, hand: Hand, run_host: NotingCarrier
) -> None:
    """Pub/sub may lose a notice; the box keeps it."""
    run_host.known_runs.add("r1")
    owned_by(hand, start_heartbeat(), "r1")

    hand.store.run(scripts.cancel(run_id="r1", reason="enough", force=False))

    wait_for(lambda: ("r1", LatchReason.CANCELLED) in run_host.latched, "the run was latched")


def test_a_lost_lease_is_let_go_of_before_a_new_incarnation_registers(
    start_heartbeat: StartHeartbeat, hand: Hand, run_host: NotingCarrier
) -> None:
    """A lease ends once and for ever: the worker becomes somebody new, with no runs."""
    run_host.letting_go.clear()
    heartbeat = start_heartbeat()
    first = registered(heartbeat)

    hand.store.ask(lambda r: r.zrem(hand.store.keys("workers"), first))
    wait_for(lambda: run_host.all_latched == [LatchReason.FENCED], "all runs were told to let go")
    still = heartbeat.lease.incarnation
    heartbeat._loop.call_soon_threadsafe(run_host.letting_go.set)

    wait_for(lambda: heartbeat.lease.incarnation != first, "a new incarnation registered")
    assert still == first
    assert heartbeat.lease.remaining_s() > 0
    answered = hand.store.ask(lambda r: r.hget(hand.store.keys("lease_end", first), "answered"))
    assert answered == "1", "it says that the old one did not die"


def test_a_worker_that_cannot_reach_redis_lets_go_before_its_lease_ends(
    start_heartbeat: StartHeartbeat, run_host: NotingCarrier, bridge: LoopThread
) -> None:
    """Nobody has to tell it that others may take its runs: it counts for itself."""
    with EmbeddedRedis() as redis:
        heartbeat = start_heartbeat(Cell(redis.url))
        registered(heartbeat)
        lease = heartbeat.lease

    wait_for(lambda: run_host.all_latched == [LatchReason.FENCED], "all runs were told to let go")

    wait_for(lease.let_go.is_set, "the process knows that they have")
    assert lease.remaining_s() == 0


def test_a_worker_waits_for_a_redis_that_is_not_there_yet(start_heartbeat: StartHeartbeat) -> None:
    """Start order does not matter."""
    with EmbeddedRedis() as first:
        url, port = first.url, first.port
    heartbeat = start_heartbeat(Cell(url))
    assert not heartbeat.wait_registered(0.3)

    with EmbeddedRedis(port=port):
        assert heartbeat.wait_registered(10)
        heartbeat.retire()


def test_a_worker_that_retires_leaves_nothing_behind(start_heartbeat: StartHeartbeat, hand: Hand) -> None:
    """Nobody has to wait for the lease of a worker that ended by itself."""
    heartbeat = start_heartbeat()
    incarnation = registered(heartbeat)

    answer = heartbeat.retire()

    assert answer == "GONE"
    assert deadline(hand.store, incarnation) is None
    assert heartbeat.lease.remaining_s() == 0


@pytest.mark.allow_blocking(reason="it is what the test is about")
def test_a_busy_loop_does_not_starve_the_heart(
    start_heartbeat: StartHeartbeat, hand: Hand, bridge: LoopThread
) -> None:
    """One run that computes for long does not cost the others their worker."""
    heartbeat = start_heartbeat()
    incarnation = registered(heartbeat)
    free = threading.Event()
    bridge.loop.call_soon_threadsafe(free.wait)
    first = deadline(hand.store, incarnation)

    try:
        wait_for(lambda: deadline(hand.store, incarnation) != first, "renewed beside the blocked loop")
    finally:
        free.set()
