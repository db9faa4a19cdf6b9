"""Workers are killed around the job of a tool call: it is started once, and its result reaches the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from openagents_worker.models import RunState
from tests.support.job_server import job_server
from tests.support.supervised_deployment import World
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

SHORT = ("submitted", "running", "succeeded")
LONG = ("begin", "submitted", "poll", "running", "succeeded") * 3


@pytest.mark.parametrize(
    "moments", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_a_job_is_started_once_whatever_dies_and_cancelled_with_its_run(
    tmp_path: Path, moments: Sequence[str]
) -> None:
    """Each run loses its worker at another moment: before the request that starts the job, after it, before a
    question, after one, and after the one that has brought the result. A run that is parked when it is
    cancelled ends at once, and then a worker cancels its job."""
    with job_server(ends_after=2) as service:
        env = {"FAULTS_JOBS_URL": service.url, "OPENAGENTS_MAX_RECOVERIES": "50"}
        with World(tmp_path, workers=2, env=env) as world:
            world.start()
            world.submit("endless", [("render", {})], agent="rendering")
            run_ids = [f"run-{number}" for number in range(len(moments))]
            for run_id, moment in zip(run_ids, moments, strict=True):
                world.mark(run_id, moment)
                world.submit(run_id, [("render", {})], agent="rendering")
            for run_id in run_ids:
                assert world.wait(run_id).final_output == "done after 1"
                names = [event.name for event in world.assert_complete_events(run_id)]
                assert names.count("tool.background.completed") == 1
            assert world.unreached_marks() == []
            assert set(Counter(key.partition(":")[0] for key in service.started).values()) == {1}
            wait_for(lambda: world.record("endless").state is RunState.WAITING, "the last run is parked")
            world.client.cancel("endless")
            assert world.wait("endless").stop_reason == "cancelled"
            wait_for(lambda: len(service.cancelled) == 1, "the job is cancelled")
