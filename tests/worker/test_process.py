"""The worker process as a whole: its background parts, and a run that does not wait for a slow broker."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Generator, Sequence
from datetime import UTC, datetime, timedelta

import pytest

from openagents_worker.agents import load_agents
from openagents_worker.producer.client import Client
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.settings import load_settings
from openagents_worker.store.part_health import PartState
from openagents_worker.store.scripts import Wake
from openagents_worker.worker.process import WorkerProcess
from openagents_worker.worker.registration import WorkerIdentity
from tests.support.runner import agent
from tests.support.waiting import wait_for

WAKE = Wake("r1", "agents", 1, "a", "s1", 1, 0, "")


class SilentBroker:
    """Accepts messages only after `is_answering` is set."""

    def __init__(self) -> None:
        self.is_answering = threading.Event()
        self.accepted: list[str] = []

    def publish(self, wakes: Sequence[Wake]) -> None:
        assert self.is_answering.wait(60)
        self.accepted += [wake.run_id for wake in wakes]


@pytest.fixture
def broker() -> SilentBroker:
    return SilentBroker()


@pytest.fixture
def process(redis_url: str, broker: SilentBroker) -> Generator[WorkerProcess]:
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_LEASE_MS": "1000"})
    assembly = Assembly(load_agents(json.dumps({"agents": [agent()]}), env={}), env={})
    identity = WorkerIdentity(node="w1@test", queues=["agents"])
    process = WorkerProcess(settings, assembly, identity, send_wakes=broker.publish)
    process.start()
    yield process
    broker.is_answering.set()
    process.close()


def test_a_run_does_not_wait_for_a_broker_that_is_silent(
    process: WorkerProcess, broker: SilentBroker
) -> None:
    """Otherwise it could not stop in time at the end of the lease. The wake-up is sent when the broker
    accepts it."""
    process.run(process.send_wakes([WAKE]))
    accepted_before = list(broker.accepted)
    broker.is_answering.set()

    wait_for(lambda: broker.accepted == ["r1"], "the broker has the wake-up")
    assert accepted_before == []


def test_every_background_part_reports_its_health(process: WorkerProcess) -> None:
    """The figures name each part with its last good round and its last error."""
    wait_for(
        lambda: all(process.stats()["parts"][name]["rounds"] for name in ("heartbeat", "rescue", "watchdog")),
        "the parts have worked",
    )

    parts = process.stats()["parts"]

    assert list(parts) == [
        "completion acks",
        "control channel",
        "outbox",
        "rescue",
        "heartbeat",
        "local processes",
        "watchdog",
        "stall monitor",
    ]
    assert not any(health["is_failing"] for health in parts.values())
    assert json.loads(json.dumps(parts)) == parts


def test_other_processes_see_a_part_that_fails(process: WorkerProcess, redis_url: str) -> None:
    """With each heartbeat a worker stores which of its parts fail, since when, and the last error."""
    monitor = wait_for(lambda: process._stall_monitor.pid, "the monitor process runs")
    before = datetime.now(UTC) - timedelta(seconds=5)  # the clock of Redis is that of this machine
    with Client(redis_url) as client:
        wait_for(client.workers, "the worker is registered")
        assert [worker.parts for worker in client.workers()] == [()]

        os.kill(monitor, signal.SIGKILL)
        (part,) = wait_for(lambda: client.workers()[0].parts, "the heartbeat has reported the part")

    assert (part.part, part.state, part.code) == ("stall monitor", PartState.FAILING, "guard.ended")
    assert part.failures == 1
    assert before < part.since < datetime.now(UTC) + timedelta(seconds=5)
