"""Redis is silent for longer than a lease: nobody died, so nobody ends and nobody is blamed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from openagents_worker.worker.watchdog import EX_LOOP_DEAD
from tests.faults.conftest import MakeWorld
from tests.faults.world import World
from tests.proxy import Stalled
from tests.waiting import PATIENCE_S, wait_for


def _silence(world: World, times: int, number: int) -> None:
    """Until every worker has let go of its runs; then until each has a lease of its own again."""
    before = set(world.incarnations())
    with world.silent_redis():
        wait_for(
            lambda: sum(map(len, world.said("worker.let_go").values())) >= times * number,
            f"{number} workers have let go of their runs",
            PATIENCE_S,
        )
    wait_for(
        lambda: len(world.ready()) >= number and not before & set(world.incarnations()),
        "every worker has another lease, and the old ones are over",
        PATIENCE_S,
    )


def _check(world: World, *, workers: int, runs: int, silences: int) -> None:
    run_ids = [f"run-{number}" for number in range(runs)]
    pids = set(world.live_workers())
    for run_id in run_ids:
        world.submit(run_id, [("step", {"n": n, "ms": 300}) for n in range(6)], latency_ms=300)
    world.wait_steps(runs // 2)

    for number in range(silences):
        _silence(world, number + 1, workers)

    for run_id in run_ids:
        assert world.wait(run_id).final_output == "done after 6"
        world.assert_told_once(run_id)
        key = world.client.store.keys("run", run_id)
        assert world.client.store.redis.hget(key, "stuck") == "0", "nobody died, so nobody is blamed"
    assert set(world.live_workers()) == pids, "every process has lived through it"
    assert world.said("worker.did_not_let_go") == {}


def test_workers_live_through_a_silence_of_redis_that_costs_their_leases(make_world: MakeWorld) -> None:
    """They register anew and execute what they had; a lease of three seconds leaves one second for it."""
    world = make_world(workers=2, lease_ms=3_000).start()

    _check(world, workers=2, runs=20, silences=2)


def test_a_worker_without_a_lease_takes_no_message(make_world: MakeWorld) -> None:
    """It could not claim a run, and another worker can. One of two is cut off from the Redis of the runs, and
    not from its broker."""
    world = make_world(workers=2, lease_ms=3_000)
    with Stalled(world.redis.url) as lines:
        world.redis_url_of = lambda name: lines.url if name == "w1" else world.redis.url
        world.start()
        lines.stall()
        wait_for(lambda: "w1" in world.said("worker.let_go"), "the worker has let go", PATIENCE_S)

        with world.celery_events() as heard:
            for number in range(20):
                world.submit(f"run-{number}")
            for number in range(20):
                world.wait(f"run-{number}", PATIENCE_S)
            wait_for(lambda: sum(_is_received(event) for event in heard) >= 20, "all were taken by somebody")

        taken = Counter(event["hostname"].partition("@")[0] for event in heard if _is_received(event))
        # The command that was waiting in the broker when the lease ended may still bring one.
        assert taken["w1"] <= 1
        world.end()


def _is_received(event: dict[str, Any]) -> bool:
    return bool(event["type"] == "task-received")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_live_through_silences_at_the_default_lease(make_world: MakeWorld) -> None:
    """Three in a row, two hundred runs."""
    world = make_world(workers=2, lease_ms=10_000, concurrency=200).start()

    _check(world, workers=2, runs=200, silences=3)


def test_a_process_ends_that_cannot_stop_a_tool_when_its_lease_is_over(make_world: MakeWorld) -> None:
    """A thread cannot be stopped, and the run's successor must not act beside it. One line says why."""
    world = make_world(workers=1, lease_ms=3_000).start()
    world.mark("stuck", "0.linger")
    world.submit("stuck", [("linger", {"n": 0})])
    wait_for(
        lambda: any(entry["event"] == "lingers" for entry in world.entries("stuck")), "it is in its thread"
    )
    [worker] = world.live_workers().values()

    with world.silent_redis():
        wait_for(lambda: not worker.alive, "the process has ended", PATIENCE_S)

    assert worker.process.exit_code == EX_LOOP_DEAD
    # The attempt and the watchdog give it equally long: whoever comes first says so, and ends the process.
    said = [world.said(event) for event in ("worker.did_not_let_go", "run.does_not_stop")]
    lines = [line for by_worker in said for of_worker in by_worker.values() for line in of_worker]
    assert lines
    assert all(f"exit_code={EX_LOOP_DEAD}" in line for line in lines)
    assert world.wait("stuck", PATIENCE_S).final_output == "done after 1"
