"""A process that dies is noticed at once, not when its lease ends: that lies far beyond these tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from openagents_worker.store.embedded import EmbeddedRedis
from openagents_worker.worker.neighbours import this_process
from tests.faults.conftest import MakeWorld
from tests.faults.world import World
from tests.pool.shopkeeper import PATIENCE_S, Shop, agent, open_shop
from tests.waiting import wait_for

LEASE_MS = 600_000
# Workers that count as workers of different hosts
ELSEWHERE = {"OPENAGENTS_WATCH_PROCESSES": "false", "OPENAGENTS_HEARTBEAT_MS": "1000"}
here = pytest.mark.skipif(this_process() is None, reason="no process can be looked at here")


def ages_ms(world: World, run_ids: Sequence[str]) -> list[int]:
    """For how long the leases were over when the runs were taken from their workers."""
    events = [event for run_id in run_ids for event in world.assert_told_once(run_id)]
    return [int(str(e.payload["age_ms"])) for e in events if e.name == "run.recovered"]


def busy(world: World, count: int) -> list[str]:
    """Runs in the middle of a call to the model."""
    run_ids = [f"run-{number}" for number in range(count)]
    for run_id in run_ids:
        world.submit(run_id, latency_ms=400)
    wait_for(
        lambda: (
            {str(entry["key"]).partition(":")[0] for entry in world.model.log if entry["event"] == "received"}
            >= set(run_ids)
        ),
        "each run waits for the model",
        30,
    )
    return run_ids


@here
def test_a_worker_on_the_same_host_takes_over_at_once(make_world: MakeWorld) -> None:
    """One of two workers is killed: the other sees it, and carries its runs to their end."""
    world = make_world(workers=2, lease_ms=LEASE_MS).start()
    world.restarts = False
    run_ids = busy(world, 20)
    victim = world.owner(run_ids[0])

    world.kill(victim)

    for run_id in run_ids:
        world.wait(run_id)
    assert ages_ms(world, run_ids), "the victim's runs were recovered"
    assert all(age_ms < LEASE_MS for age_ms in ages_ms(world, run_ids))


@here
def test_a_worker_that_starts_takes_over_what_its_host_left_behind(make_world: MakeWorld) -> None:
    """The only worker is killed, and its supervisor starts another."""
    world = make_world(workers=1, lease_ms=LEASE_MS).start()
    run_ids = busy(world, 10)

    world.kill(world.owner(run_ids[0]))

    for run_id in run_ids:
        world.wait(run_id)
    assert len(ages_ms(world, run_ids)) == len(run_ids)


@here
def test_a_worker_that_is_stopped_is_not_taken_for_dead(make_world: MakeWorld) -> None:
    """SIGSTOP: the process may go on, so its lease decides; meanwhile a death beside it is seen."""
    world = make_world(workers=3, lease_ms=LEASE_MS, concurrency=4).start()
    world.restarts = False
    run_ids = busy(world, 9)
    paused = world.owner(run_ids[0])
    its_runs = [run_id for run_id in run_ids if world.owner(run_id) is paused]
    paused.signal(signal.SIGSTOP)
    [victim, *_] = [worker for worker in world.ready() if worker is not paused]

    world.kill(victim)
    for run_id in set(run_ids) - set(its_runs):
        world.wait(run_id)
    kept = [world.record(run_id).worker for run_id in its_runs]
    paused.signal(signal.SIGCONT)

    assert all(str(worker).startswith(f"{paused.name}@") for worker in kept)
    for run_id in its_runs:
        world.wait(run_id)
    assert ages_ms(world, its_runs) == []


def test_a_worker_on_another_host_takes_over_soon(make_world: MakeWorld) -> None:
    """Nobody can look at the process; its connection is gone."""
    world = make_world(workers=2, lease_ms=LEASE_MS, env=ELSEWHERE).start()
    world.restarts = False
    wait_watched(world, 2)
    run_ids = busy(world, 20)

    world.kill(world.owner(run_ids[0]))

    for run_id in run_ids:
        world.wait(run_id)
    assert ages_ms(world, run_ids), "the victim's runs were recovered"


def test_workers_whose_connections_are_cut_again_and_again_keep_their_runs(make_world: MakeWorld) -> None:
    """`CLIENT KILL TYPE pubsub` beside work that goes on: no lease ends, no run is recovered."""
    world = make_world(workers=2, lease_ms=LEASE_MS, env=ELSEWHERE).start()
    wait_watched(world, 2)
    before = set(world.incarnations())
    run_ids = [f"run-{number}" for number in range(10)]
    for run_id in run_ids:
        world.submit(run_id, [("step", {"n": n, "ms": 200}) for n in range(15)])

    cuts = 0
    while any(not world.record(run_id).state.is_terminal for run_id in run_ids):
        world.client.store.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        cuts += 1
        if cuts % 3 == 0:  # else it is cut again while it is being made
            wait_for(lambda: listeners(world) == 2, "both listen again")

    assert cuts > 5
    assert set(world.incarnations()) == before
    assert ages_ms(world, run_ids) == []
    assert world.client.store.redis.keys("oa:gone:*") == []


def test_a_worker_that_is_stopped_is_not_given_up_by_its_connection(make_world: MakeWorld) -> None:
    """SIGSTOP closes nothing: its lease decides, while a worker that dies beside it is given up."""
    world = make_world(workers=3, lease_ms=LEASE_MS, env=ELSEWHERE).start()
    world.restarts = False
    wait_watched(world, 3)
    paused, victim, _ = world.ready()
    paused.signal(signal.SIGSTOP)

    world.kill(victim)

    wait_for(lambda: len(world.incarnations()) == 2, "the victim is gone", 60)
    assert paused.name in {incarnation.partition("@")[0] for incarnation in world.incarnations()}
    paused.signal(signal.SIGCONT)


def test_a_worker_that_was_given_up_and_lives_takes_the_death_off_its_runs(make_world: MakeWorld) -> None:
    """It was stopped, and its connection was cut meanwhile: it could not make another in time."""
    world = make_world(workers=2, lease_ms=LEASE_MS, env=ELSEWHERE).start()
    wait_watched(world, 2)
    world.submit("run", latency_ms=8_000)
    wait_for(lambda: world.model.log, "the model was asked", 30)
    paused = world.owner("run")
    paused.signal(signal.SIGSTOP)
    world.client.store.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    wait_for(lambda: world.record("run").recoveries == 1, "the run was taken from it", 60)
    world.owner("run")  # somebody else carries it

    paused.signal(signal.SIGCONT)

    wait_for(lambda: world.record("run").recoveries == 0, "the death was taken off", 60)
    world.wait("run")
    [alarm] = [event for event in world.assert_told_once("run") if event.name == "worker.false_alarm"]
    assert str(alarm.payload["alive"]).startswith(f"{paused.name}@")


def wait_watched(world: World, count: int) -> None:
    """So many workers have renewed over a connection that Redis can see."""
    store = world.client.store
    wait_for(lambda: store.redis.hlen(store.keys("watched")) == count, "they have renewed", 30)


def listeners(world: World) -> int:
    keys = world.client.store.keys
    channels = [keys.alive(incarnation) for incarnation in world.incarnations()]
    return sum(count for _, count in world.client.store.redis.pubsub_numsub(*channels))


@here
def test_the_parent_of_a_pool_of_processes_ends_the_lease_of_a_child_it_reaps(tmp_path: Path) -> None:
    """prefork: the child is killed, and its run goes on in another one."""
    with (
        EmbeddedRedis() as redis,
        open_shop(
            tmp_path,
            redis.url,
            "--pool",
            "processes",
            "-c",
            "1",
            agents=[agent("slow", {"text": "done", "latency_ms": 1_000})],
            env={"OPENAGENTS_LEASE_MS": str(LEASE_MS)},
        ) as shop,
    ):
        handle = shop.client.submit({"agent_id": "slow", "session_id": "s1", "input_text": "hi"})
        child = wait_for(lambda: _owner_pid(shop, handle.id), "a child carries the run", PATIENCE_S)

        os.kill(child, signal.SIGKILL)

        assert handle.wait(PATIENCE_S).final_output == "done"
        assert "run.recovered" in [event.name for event in handle.events()]
        told = [line for line in shop.log.splitlines() if "worker.process_dead" in line]
        assert len(told) == 1
        assert "worker.reaping" in told[0]  # the parent, which forks a new child after that


def _owner_pid(shop: Shop, run_id: str) -> int:
    """The process that has claimed the run; 0: none yet."""
    record = shop.client.record(run_id)
    own = this_process()
    assert own is not None
    process = shop.redis.hget(shop.client.store.keys("host", own.host), str(record.worker))
    return int(str(process).split()[0]) if process else 0
