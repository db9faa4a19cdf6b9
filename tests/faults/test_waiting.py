"""Workers are killed while runs wait, and while values are sent to them."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from openagents_worker.errors import RunConflict
from openagents_worker.models import RunState
from tests.faults.conftest import MakeWorld
from tests.support.supervised_deployment import World
from tests.support.waiting import wait_for

RUNS, VALUES, KILLS = 6, 5, 3


def _send_all(world: World, run_ids: list[str], chance: random.Random) -> None:
    """Send each value twice, in order for each run, to the runs in a random order. Kill workers meanwhile."""
    left = [run_id for run_id in run_ids for _ in range(VALUES)]
    chance.shuffle(left)
    sent = dict.fromkeys(run_ids, 0)
    kills = set(chance.sample(range(len(left)), KILLS))
    for at, run_id in enumerate(left):
        message = {"message_id": f"m{sent[run_id]}"}
        world.client.send(run_id, "value", sent[run_id], **message)
        with suppress(RunConflict):  # the run has ended with its last value
            world.client.send(run_id, "value", sent[run_id], **message)
        sent[run_id] += 1
        if at in kills:
            world.kill(chance.choice(world.ready()))
            world.wait_ready()


@pytest.mark.long
def test_each_value_is_received_once_and_in_order_whatever_dies(make_world: MakeWorld) -> None:
    """Also those that are sent before the run waits, while it is executed, and while it parks."""
    world = make_world(workers=2).start()
    run_ids = [f"run-{number}" for number in range(RUNS)]
    for run_id in run_ids:
        world.submit(run_id, agent="receiving", text=str(VALUES))
    wait_for(lambda: world.record(run_ids[0]).state is RunState.WAITING, "the first run is parked")

    _send_all(world, run_ids, random.Random(7))

    for run_id in run_ids:
        assert world.wait(run_id).final_output == list(range(VALUES))
        world.assert_complete_events(run_id)
        ended = [entry["key"] for entry in world.entries(run_id) if entry["event"] == "end"]
        assert len(set(ended)) == VALUES
        assert len(ended) <= VALUES + world.record(run_id).recoveries
