"""Patterns with branches, time-outs and caught errors, killed at every moment of every call."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.faults.conftest import MakeWorld
from tests.support.supervised_deployment import World, table

# By pattern: the names of its tool calls, the inputs of its model calls, and its result.
CALLS: dict[str, tuple[list[str], list[str], Any]] = {
    "batch": (
        ["a1", "b1", "c1", "d1"],
        ["d2"],
        [{"done": "a1"}, "PermanentToolError", {"done": "c1"}, {"done": "d1"}, "heard d2"],
    ),
    "branches": (
        ["a1", "a3", "b1", "b3", "c1", "c3"],
        ["a2", "b2", "c2"],
        [[{"done": f"{b}1"}, f"heard {b}2", {"done": f"{b}3"}] for b in "abc"],
    ),
    "catching": (
        ["a1", "a2", "a3"],
        ["a4"],
        [{"done": "a1"}, "PermanentToolError", {"done": "a3"}, "heard a4"],
    ),
    "impatient": (["a1", "a3"], ["a4"], [{"done": "a1"}, "too slow", {"done": "a3"}, "heard a4"]),
    "program": (
        ["a1", "b1", "c1", "c2"],
        ["d1"],
        [{"done": "a1"}, {"done": "b1"}, {"done": "c1"}, {"done": "c2"}, "heard d1"],
    ),
    "stubborn": (
        ["a1", "b1", "c1", "d2"],
        ["d3"],
        ["dict", "PermanentToolError", "dict", {"done": "d2"}, "heard d3"],
    ),
}


def _moments(agent: str) -> list[str]:
    tools, asked, _ = CALLS[agent]
    moments = [f"{n}.{moment}" for n in tools for moment in ("begin", "end")]
    return moments + [f"{text}.{moment}" for text in asked for moment in ("received", "answered")]


def _execute(world: World, agent: str, number: int, moments: list[str]) -> dict[str, object]:
    """Execute a run of the pattern with kills at these moments; returns figures of its calls."""
    run_id = f"{agent}-{number}"
    world.mark(run_id, *moments)
    world.submit(run_id, agent=agent)
    result = world.wait(run_id, timeout=30 + 10 * len(moments))

    tools, asked, answer = CALLS[agent]
    world.assert_complete_events(run_id)
    assert result.final_output == answer
    assert world.unreached_marks() == []
    log = world.entries(run_id)
    ended = Counter(entry["n"] for entry in log if entry["event"] == "end")
    begun = Counter(entry["n"] for entry in log if entry["event"] == "begin")
    assert set(tools) == set(ended), "no effect is lost"
    keys = {n: {entry["key"] for entry in log if entry["n"] == n} for n in begun}
    assert all(len(sent) == 1 for sent in keys.values()), "a repetition has the same key"
    most = 1 + len(moments)
    assert max(begun.values()) <= most, "a kill repeats no more than the calls in flight"
    assert result.usage.llm_calls == len(asked), "repeated calls are not counted twice"
    return {
        "program": agent,
        "killed at": " ".join(moments),
        "begun": sum(begun.values()),
        "calls": len(begun),
        "again after their successor": _again_after_successor(log),
    }


def _again_after_successor(log: list[dict[str, Any]]) -> int:
    """The number of calls that started again after a later call of their branch: these were finished."""
    furthest: dict[str, int] = {}
    again = 0
    for entry in log:
        if entry["event"] == "begin":
            branch, place = entry["n"][0], int(entry["n"][1:])
            again += place < furthest.get(branch, 0)
            furthest[branch] = max(furthest.get(branch, 0), place)
    return again


def _check(rows: list[dict[str, object]]) -> None:
    table("Patterns, killed at every moment", rows)
    assert all(row["again after their successor"] == 0 for row in rows)


@pytest.mark.long
def test_each_branch_continues_from_its_last_step(make_world: MakeWorld) -> None:
    """Concurrent branches are each resumed; recorded errors and time-outs are replayed.

    `program` is an agent in Python, with recorded functions.
    """
    world = make_world(workers=2).start()

    rows = [_execute(world, "batch", 1, ["b1.end", "d1.begin"])]
    rows.append(_execute(world, "branches", 1, ["a1.end", "b2.answered", "c3.begin"]))
    rows.append(_execute(world, "catching", 1, ["a2.end"]))
    rows.append(_execute(world, "impatient", 1, ["a3.begin"]))
    rows.append(_execute(world, "stubborn", 1, ["b1.end"]))
    rows.append(_execute(world, "program", 1, ["b1.end", "c2.begin", "d1.answered"]))

    _check(rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_branches_are_killed_at_every_moment(make_world: MakeWorld) -> None:
    """One kill at each moment of each call of six patterns, each in a separate run."""
    world = make_world(workers=3).start()

    moments = [(agent, moment) for agent in CALLS for moment in _moments(agent)]
    _check([_execute(world, agent, number, [moment]) for number, (agent, moment) in enumerate(moments)])
