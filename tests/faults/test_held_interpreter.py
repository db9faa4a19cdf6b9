"""A call that holds the GIL of its worker: no thread of the process can report it or end the process."""

from __future__ import annotations

import pytest

from tests.faults.conftest import MakeWorld
from tests.support.supervised_deployment import World

PATIENCE_S = 90


def submit_other_runs(world: World, count: int = 4) -> None:
    for number in range(count):
        world.submit(f"good-{number}", [("step", {"n": n, "ms": 100}) for n in range(3)], latency_ms=300)


def check_other_runs(world: World, count: int = 4) -> None:
    for number in range(count):
        assert world.wait(f"good-{number}", PATIENCE_S).final_output == "done after 3"
        key = world.client.store.keys("run", f"good-{number}")
        assert world.client.store.redis.hget(key, "stuck") == "0", "it is not a suspect"


@pytest.mark.long
@pytest.mark.parametrize(
    "how",
    [
        "regex",
        pytest.param("power", marks=pytest.mark.slow),
        pytest.param("sleep 600", marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_pattern_holds_the_gil_is_poisoned_after_the_second_time(
    make_world: MakeWorld, how: str
) -> None:
    """The stall monitor names the run and kills the worker; another worker reclaims the other runs at
    once."""
    world = make_world(workers=2, lease_ms=60_000, env={"OPENAGENTS_LOOP_DEAD_S": "2"}).start()
    submit_other_runs(world)
    world.submit("bad", agent="greedy", text=how)

    bad = world.wait("bad", PATIENCE_S)

    assert bad.error_details is not None
    assert bad.error_details.code == "run.poisoned"
    assert [entry["tool"] for entry in world.entries("bad")].count("greedy") == 2
    check_other_runs(world)
    lines = [line for lines in world.log_lines("loop.dead").values() for line in lines]
    assert len(lines) == 2
    for part in (
        "run_id=bad",
        "agent_id=greedy",
        "pattern tests.faults.plugins.Greedy",
        "hold_the_interpreter",
    ):
        assert all(part in line for line in lines), lines
    world.submit("next", [("step", {"n": 0})])
    assert world.wait("next", PATIENCE_S).final_output == "done after 1"


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["hold", "hold_in_thread"])
def test_a_tool_that_holds_the_gil_is_named(make_world: MakeWorld, tool: str) -> None:
    """Also a sync tool in its thread; the lease is the limit, as by default."""
    world = make_world(workers=2, lease_ms=20_000).start()  # twice the default: the machine may be busy
    submit_other_runs(world)
    world.submit("bad", [(tool, {"how": "regex", **({"n": 0} if tool == "hold" else {})})])

    bad = world.wait("bad", PATIENCE_S)

    assert bad.error_details is not None
    assert bad.error_details.code == "run.poisoned"
    assert [entry["tool"] for entry in world.entries("bad")] == [tool, tool]
    check_other_runs(world)
    lines = [line for lines in world.log_lines("loop.dead").values() for line in lines]
    assert [f'plugin="tool {tool}"' in line for line in lines] == [True, True]
