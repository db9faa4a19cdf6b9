"""Many runs of few sessions while workers are killed: they stay ordered and never overlap."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tests.faults.conftest import MakeWorld
from tests.support.supervised_deployment import World, table
from tests.support.waiting import wait_for

STEPS = 2


def _check(world: World, sessions: int, runs: int, kills: int) -> None:
    chance = random.Random(1)
    for number in range(runs):
        for session in range(sessions):
            world.submit(
                f"s{session}-{number:03}",
                [("step", {"n": n, "ms": 20}) for n in range(STEPS)],
                session=f"s{session}",
                latency_ms=10,
            )
    whole = sessions * runs * STEPS
    for kill in range(1, kills + 1):
        part = whole * kill // (kills + 1)
        world.wait_steps(part)
        world.kill(chance.choice(wait_for(world.ready, "a worker is alive", 60)))
    for session in range(sessions):
        for number in range(runs):
            assert world.wait(f"s{session}-{number:03}", 120).final_output == f"done after {STEPS}"

    rows = [_story(world, f"s{session}", runs) for session in range(sessions)]
    table(f"{runs} runs in each of {sessions} sessions, {kills} kills", rows)
    for row in rows:
        assert row["out of order"] == row["overlaps"] == row["messages missing"] == 0


def _story(world: World, session: str, runs: int) -> dict[str, object]:
    entries = sorted((e for e in world.entries() if e["session"] == session), key=lambda entry: entry["at"])
    spans: dict[str, tuple[float, float]] = {}
    for entry in entries:
        first, _ = spans.get(entry["run"], (entry["at"], 0.0))
        spans[entry["run"]] = (first, entry["at"])
    order = list(spans)
    inputs = [
        message["run_id"] for message in world.client.session(session).transcript if message["role"] == "user"
    ]
    in_order = [f"{session}-{number:03}" for number in range(runs)]
    return {
        "session": session,
        "runs": len(spans),
        "steps begun": sum(entry["event"] == "begin" for entry in entries),
        "out of order": sum(one != other for one, other in zip(order, in_order, strict=True)),
        "overlaps": sum(spans[a][1] > spans[b][0] for a, b in pairwise(order)),
        "messages missing": 0 if inputs == in_order else len(in_order),
    }


def test_runs_of_a_session_keep_their_order_while_workers_die(make_world: MakeWorld) -> None:
    """Runs of one session are executed one after another in the order of submission, whatever is killed."""
    world = make_world(workers=2, lease_ms=1_000).start()

    _check(world, sessions=4, runs=3, kills=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_runs_of_ten_sessions(make_world: MakeWorld) -> None:
    """A hundred runs in ten sessions on three workers, with ten kills."""
    world = make_world(workers=3, lease_ms=1_000).start()

    _check(world, sessions=10, runs=10, kills=10)
