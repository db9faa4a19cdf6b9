"""Redis is silent for longer than a lease: no process ends, and no run becomes a suspect."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from openagents_worker.worker.watchdog import EX_LOOP_DEAD
from tests.faults.conftest import MakeWorld
from tests.support.proxy import Stalled
from tests.support.supervised_deployment import World
from tests.support.waiting import PATIENCE_S, wait_for


def _silence(world: World, times: int, number: int) -> None:
    """Stop Redis until every worker has stopped its runs; then wait until each has a new lease."""
    before = set(world.incarnations())
    with world.silent_redis():
        wait_for(
            lambda: sum(map(len, world.log_lines("worker.let_go").values())) >= times * number,
            f"{number} workers have stopped their runs",
            PATIENCE_S,
        )
    wait_for(
        lambda: len(world.ready()) >= number and not before & set(world.incarnations()),
        "every worker has a new lease, and the old ones have ended",
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
        world.assert_complete_events(run_id)
        key = world.client.store.keys("run", run_id)
        assert world.client.store.redis.hget(key, "stuck") == "0", "no worker died, so no run is a suspect"
    assert set(world.live_workers()) == pids, "every process is still alive"
    assert world.log_lines("worker.did_not_let_go") == {}


@pytest.mark.long
def test_workers_survive_a_silence_of_redis_that_ends_their_leases(make_world: MakeWorld) -> None:
    """They register new incarnations and execute their runs; a lease of three seconds leaves one second."""
    world = make_world(workers=2, lease_ms=3_000).start()

    _check(world, workers=2, runs=20, silences=2)


@pytest.mark.long
def test_a_worker_without_a_lease_receives_no_message(make_world: MakeWorld) -> None:
    """It could not claim a run, but another worker can. One of two workers is disconnected from the Redis of
    the runs, but not from its broker."""
    world = make_world(workers=2, lease_ms=3_000)
    with Stalled(world.redis.url) as lines:
        world.redis_url_of = lambda name: lines.url if name == "w1" else world.redis.url
        world.start()
        lines.stall()
        wait_for(
            lambda: "w1" in world.log_lines("worker.let_go"), "the worker has stopped its runs", PATIENCE_S
        )

        with world.celery_events() as received:
            for number in range(20):
                world.submit(f"run-{number}")
            for number in range(20):
                world.wait(f"run-{number}", PATIENCE_S)
            wait_for(
                lambda: sum(_is_received(event) for event in received) >= 20, "all messages were received"
            )

        messages = Counter(event["hostname"].partition("@")[0] for event in received if _is_received(event))
        # The blocking command that was sent before the end of the lease may still return one.
        assert messages["w1"] <= 1
        world.end()


def _is_received(event: dict[str, Any]) -> bool:
    return bool(event["type"] == "task-received")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_survive_silences_with_the_default_lease(make_world: MakeWorld) -> None:
    """Three silences with two hundred runs."""
    world = make_world(workers=2, lease_ms=10_000, concurrency=200).start()

    _check(world, workers=2, runs=200, silences=3)


@pytest.mark.long
def test_a_process_ends_that_cannot_stop_a_tool_when_its_lease_is_over(make_world: MakeWorld) -> None:
    """A thread cannot be stopped, and the run may be executed elsewhere. One log line names the reason."""
    world = make_world(workers=1, lease_ms=3_000).start()
    world.mark("stuck", "0.linger")
    world.submit("stuck", [("linger", {"n": 0})])
    wait_for(
        lambda: any(entry["event"] == "lingers" for entry in world.entries("stuck")),
        "the tool is in its thread",
    )
    [worker] = world.live_workers().values()

    with world.silent_redis():
        wait_for(lambda: not worker.alive, "the process has ended", PATIENCE_S)

    assert worker.process.exit_code == EX_LOOP_DEAD
    # The attempt and the watchdog use the same time-out: the first one logs it and ends the process.
    log_lines = [world.log_lines(event) for event in ("worker.did_not_let_go", "run.does_not_stop")]
    lines = [line for by_worker in log_lines for of_worker in by_worker.values() for line in of_worker]
    assert lines
    assert all(f"exit_code={EX_LOOP_DEAD}" in line for line in lines)
    assert world.wait("stuck", PATIENCE_S).final_output == "done after 1"
