"""Workers are killed while runs delegate: no child is lost, and none is executed twice."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any

import pytest

from tests.faults.breaks import Breaks, breaks_in
from tests.faults.conftest import MakeWorld, runs_below
from tests.support.supervised_deployment import World, table
from tests.support.waiting import wait_for


def _submit(world: World, run_id: str, children: int, at_once: int | None = None, levels: int = 0) -> None:
    world.submit(run_id, agent="team", text=json.dumps([children, at_once, levels]))


def _check(world: World, run_id: str, children: int, levels: int = 0) -> dict[str, Any]:
    """The run has all results in order, each child exists once, and no finished step was repeated."""
    assert world.wait(run_id, timeout=200).final_output == list(range(children))
    below = runs_below(world, run_id)
    assert len(below) == children * (levels + 1)
    begun: dict[str, set[str]] = defaultdict(set)
    ended: dict[str, int] = defaultdict(int)
    recoveries = world.record(run_id).recoveries
    for run in below:
        assert run.state == "completed"
        world.assert_complete_events(run.run_id)
        recoveries += run.recoveries
    world.assert_complete_events(run_id)
    ids = {run_id, *(run.run_id for run in below)}
    for entry in world.entries():
        if entry["run"] in ids:
            begun[entry["n"]].add(entry["key"])
            ended[entry["n"]] += entry["event"] == "end"
    expected = {f"{number}-{level}" for number in range(children) for level in range(levels + 1)}
    assert set(begun) == expected | {"before", "after"}
    assert {n: len(keys) for n, keys in begun.items()} == dict.fromkeys(begun, 1), "one key for each effect"
    again = sum(count - 1 for count in ended.values())
    assert again <= recoveries, "a kill repeats at most the call in flight"
    return {"run": run_id, "children": len(below), "recoveries": recoveries, "steps again": again}


def _kill_at_random(world: World, run_id: str, kills: int, seed: int, most: int) -> None:
    """Kill a worker each time when a few more steps have ended."""
    chance = random.Random(seed)
    for number in range(1, kills + 1):
        wait_for(
            lambda number=number: (
                sum(entry["event"] == "end" for entry in world.entries()) >= number * most // (kills + 1)
                or world.record(run_id).state.is_terminal
            ),
            "more steps have ended",
        )
        world.kill(chance.choice(world.ready()))
        world.wait_ready()


@pytest.mark.long
def test_ten_children_are_made_once_whatever_dies(make_world: MakeWorld) -> None:
    """Also when a worker dies as it executes a child, and as it goes on after them; the order is kept."""
    world = make_world(workers=2).start()
    world.mark("any", "3-0.end", "7-1.begin", "after.begin")
    _submit(world, "team", 10, 4, levels=1)
    row = _check(world, "team", 10, levels=1)
    assert world.unreached_marks() == []
    table("Children while workers are killed", [row])


@pytest.mark.long
def test_three_levels_end_on_a_worker_with_one_slot(make_world: MakeWorld) -> None:
    """A run that waits for a child holds no slot."""
    world = make_world(workers=1, concurrency=1).start()
    _submit(world, "deep", 2, levels=2)
    _check(world, "deep", 2, levels=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("at_once", [None, 20])
def test_a_hundred_children_over_three_workers(make_world: MakeWorld, at_once: int | None) -> None:
    world = make_world(workers=3).start()
    _submit(world, "team", 100, at_once)
    _kill_at_random(world, "team", kills=10, seed=7, most=100)
    table("A hundred children while workers are killed", [_check(world, "team", 100)])


def _breaks(world: World) -> AbstractContextManager[Breaks]:
    """Runs with two children, each of which has one."""

    def execute(run_id: str) -> dict[str, Any]:
        _submit(world, run_id, 2, levels=1)
        return _check(world, run_id, 2, levels=1)

    return breaks_in(world, execute)


@pytest.mark.long
def test_a_parent_and_its_children_outlive_a_break_at_each_script(make_world: MakeWorld) -> None:
    """The scripts by which children are made, waited for and ended: their answer is lost, or the worker dies
    before or after them."""
    with _breaks(make_world(workers=2)) as breaks:
        for fault, at in (
            ("answer lost", "delegate"),
            ("killed after", "delegate"),
            ("killed before", "suspend"),
            ("answer lost", "suspend"),
            ("killed before", "finish"),
            ("killed after", "finish"),
        ):
            assert breaks.at(fault, at), f"{fault} {at}: there was no such command"
        table("A break at the scripts of children", breaks.rows)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("fault", ["killed before", "killed after", "answer lost"])
def test_a_break_at_every_command_of_a_parent_and_its_children(make_world: MakeWorld, fault: str) -> None:
    with _breaks(make_world(workers=3)) as breaks:
        least = len(breaks.commands()) * 2 // 3  # batches of events depend on time
        breaks.at_every_command(fault)
        table("A break at every command", breaks.rows)
        assert len(breaks.rows) >= least
