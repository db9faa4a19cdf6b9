"""The worker process as a whole: what it does not wait for."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Sequence

import pytest

from openagents_worker.agents import load_agents
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.settings import load_settings
from openagents_worker.store.scripts import Wake
from openagents_worker.worker.process import WorkerProcess
from tests.runtime.harness import agent
from tests.waiting import wait_for

WAKE = Wake("r1", "agents", 1, "a", "s1", 1, 0, "")


class SilentBroker:
    """Takes a message when it is told to."""

    def __init__(self) -> None:
        self.speaks = threading.Event()
        self.taken: list[str] = []

    def publish(self, wakes: Sequence[Wake]) -> None:
        assert self.speaks.wait(60)
        self.taken += [wake.run_id for wake in wakes]


@pytest.fixture
def broker() -> SilentBroker:
    return SilentBroker()


@pytest.fixture
def process(redis_url: str, broker: SilentBroker) -> Generator[WorkerProcess]:
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_LEASE_MS": "1000"})
    assembly = Assembly(load_agents(json.dumps({"agents": [agent()]}), env={}), env={})
    process = WorkerProcess(settings, assembly, node="w1@test", queues=["agents"], send_wakes=broker.publish)
    process.start()
    yield process
    broker.speaks.set()
    process.close()


def test_a_run_does_not_wait_for_a_broker_that_is_silent(
    process: WorkerProcess, broker: SilentBroker
) -> None:
    """It could not let go in time when the lease is over. The wake-up follows once the broker takes it."""
    process.run(process.send_wakes([WAKE]))
    taken_before = list(broker.taken)
    broker.speaks.set()

    wait_for(lambda: broker.taken == ["r1"], "the broker has taken the wake-up")
    assert taken_before == []
