"""One run of many crashes its process every time."""

from __future__ import annotations

import pytest

from tests.faults.conftest import MakeWorld
from tests.support.supervised_deployment import World, table

PATIENCE_S = 90


def _check(world: World, other_runs: int, steps: int, timeout_s: float) -> None:
    for number in range(other_runs):
        world.submit(f"good-{number}", [("step", {"n": n, "ms": 100}) for n in range(steps)], latency_ms=50)
    world.submit("bad", [("step", {"n": 0}), ("segfault", {"n": 1})])

    bad = world.wait("bad", timeout_s)
    good = [world.wait(f"good-{number}", timeout_s) for number in range(other_runs)]

    deaths = sum(entry["tool"] == "segfault" for entry in world.entries("bad"))
    finished = [result for result in good if result.final_output == f"done after {steps}"]
    code = bad.error_details.code if bad.error_details else None
    begun = [world.calls(f"good-{number}") for number in range(other_runs)]
    row = {
        "runs": other_runs + 1,
        "completed": len(finished),
        "the bad one": code,
        "processes it took": deaths,
        "calls of the others": sum(len(set(calls)) for calls in begun),
        "of them begun": sum(map(len, begun)),
    }
    table("A tool that ends its process", [row])
    assert len(finished) == other_runs
    assert code == "run.poisoned"
    assert all(len(set(calls)) == 2 * steps + 1 for calls in begun)
    names = [event.name for event in world.assert_complete_events("bad", "run.failed")]
    assert "run.poisoned" in names
    for number in range(other_runs):
        world.assert_complete_events(f"good-{number}")


def test_a_run_that_kills_its_workers_is_poisoned_and_other_runs_complete(make_world: MakeWorld) -> None:
    """A run whose tool crashes the process repeatedly ends as poisoned; other runs of the process
    complete."""
    world = make_world(workers=1, lease_ms=1_000, env={"OPENAGENTS_MAX_RECOVERIES": "2"}).start()

    _check(world, other_runs=19, steps=2, timeout_s=90)


@pytest.mark.long
def test_a_run_that_blocks_the_event_loop_is_poisoned_after_the_second_time(make_world: MakeWorld) -> None:
    """The watchdog names it, so no other run is a suspect, and no worker waits for the lease."""
    world = make_world(workers=1, lease_ms=60_000, env={"OPENAGENTS_LOOP_DEAD_S": "1"}).start()
    for number in range(10):
        world.submit(f"good-{number}", [("step", {"n": n, "ms": 100}) for n in range(3)], latency_ms=300)
    world.submit("bad", [("block", {"n": 0})])

    bad = world.wait("bad", PATIENCE_S)

    assert bad.error_details is not None
    assert bad.error_details.code == "run.poisoned"
    assert [entry["tool"] for entry in world.entries("bad")] == ["block", "block"]
    for number in range(10):
        assert world.wait(f"good-{number}", PATIENCE_S).final_output == "done after 3"
        key = world.client.store.keys("run", f"good-{number}")
        assert world.client.store.redis.hget(key, "stuck") == "0", "it is not a suspect"


@pytest.mark.long
def test_a_run_in_a_long_call_is_not_poisoned_for_its_neighbour(make_world: MakeWorld) -> None:
    """The neighbour commits a step in each process before it kills it, so the other run is the only suspect.

    It is executed alone before it could be poisoned. Its call ends, and then both runs complete.
    """
    world = make_world(workers=1, lease_ms=1_000, env={"OPENAGENTS_MAX_RECOVERIES": "1"}).start()
    deaths = ["1.begin", "3.begin", "5.begin", "7.begin"]
    world.mark("neighbour", *deaths)
    world.submit("in-a-long-call", [("step", {"n": 0})], latency_ms=4_000)
    world.submit("neighbour", [("step", {"n": n}) for n in range(9)])

    results = [world.wait(run_id, PATIENCE_S) for run_id in ("in-a-long-call", "neighbour")]

    assert [result.final_output for result in results] == ["done after 1", "done after 9"]
    assert world.unreached_marks() == []
    for run_id in ("in-a-long-call", "neighbour"):
        world.assert_complete_events(run_id)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_of_a_hundred_runs_kills_its_process(make_world: MakeWorld) -> None:
    """Of a hundred runs in one process, 99 complete and one is poisoned, with the default limits."""
    world = make_world(workers=1, concurrency=200).start()

    _check(world, other_runs=99, steps=5, timeout_s=500)
