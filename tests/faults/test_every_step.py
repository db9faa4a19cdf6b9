"""A worker is killed at every step of a run: finished steps are not repeated."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from tests.faults.conftest import TIMES, MakeWorld
from tests.support.supervised_deployment import World, table


def _marks(steps: int) -> list[str]:
    """Every moment of a run with `steps` tool calls: each call was received, and each call was answered."""
    moments = []
    for n in range(steps):
        moments += [f"model-{n}.received", f"model-{n}.answered", f"{n}.begin", f"{n}.end"]
    return [*moments, f"model-{steps}.received", f"model-{steps}.answered"]


def _execute(world: World, run_id: str, steps: int, marks: list[str]) -> dict[str, Any]:
    world.mark(run_id, *marks)
    world.submit(run_id, [("step", {"n": n}) for n in range(steps)])
    result = world.wait(run_id, timeout=30 + 10 * len(marks))
    world.assert_complete_events(run_id)
    assert world.unreached_marks() == []
    begun = world.calls(run_id)
    place = {key: number for number, key in enumerate(dict.fromkeys(begun))}
    after_a_later_one = [a for a, b in pairwise(begun) if place[b] < place[a]]
    view = world.client.session(f"session-of-{run_id}")
    return {
        "run": run_id,
        "kills": len(marks),
        "calls": len(place),
        "begun": len(begun),
        "most": max(Counter(begun).values()),
        "finished repeated": len(after_a_later_one),
        "answer": result.final_output,
        "done": view.state["done"],
        "usage": result.usage.model_dump(exclude=TIMES),
        "transcript": len(view.transcript),
    }


def _check(world: World, steps: int, marks: list[str]) -> None:
    plain = _execute(world, "plain", steps, [])
    killed = _execute(world, "killed", steps, marks)

    shown = ("run", "kills", "calls", "begun", "most", "finished repeated", "answer")
    table("A worker is killed at every moment", [{k: row[k] for k in shown} for row in (plain, killed)])
    assert plain["calls"] == plain["begun"] == 2 * steps + 1
    assert killed["finished repeated"] == 0
    assert killed["begun"] <= plain["begun"] + len(marks), "a kill repeats at most the call in flight"
    assert killed["most"] <= 3, "each call was hit twice"
    for same in ("answer", "usage", "calls", "done", "transcript"):
        assert killed[same] == plain[same]


@pytest.mark.defect("D02", "D07")
def test_a_finished_step_is_not_repeated(make_world: MakeWorld) -> None:
    """A worker that is killed before or after a reply costs a repetition of that call, and no other
    change."""
    world = make_world(workers=2).start()

    _check(world, 2, ["model-0.received", "0.begin", "0.end", "model-1.answered"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_dies_twice_at_each_call_of_ten_steps(make_world: MakeWorld) -> None:
    """42 kills in one run of ten tools: the same answer and usage, no repeated finished call."""
    world = make_world(workers=3).start()

    _check(world, 10, _marks(10))
