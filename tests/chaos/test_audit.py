"""The audit finds a run that is not ended, also one that had ended before Redis lost its last second."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from chaos.audit import audit
from chaos.evidence import Evidence
from chaos.load import Accepted, Load
from chaos.requests import Plan
from openagents_worker import Client


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    """A client of an installation without workers, with one accepted run."""
    with Client(redis_url) as client:
        client.submit({"agent_id": "a", "session_id": "s1", "input_text": "go", "run_id": "r1"})
        yield client


def accepted(run_id: str) -> Accepted:
    return Accepted(run_id, "s1", Plan("a", "go"), time.monotonic())


def test_a_run_that_nobody_ends_is_stuck(client: Client) -> None:
    """Whether those who waited for it have noticed it or not; it is one violation."""
    for noticed in ([], ["r1"]):
        found, _ = audit(client, Evidence(accepted=[accepted("r1")], stuck=noticed))

        assert found.stuck == ["r1 has not ended"]
        assert not found.clean()


def test_after_the_last_fault_every_run_is_asked_for_again(client: Client) -> None:
    """The end of a run may be in what Redis has lost since."""
    load = Load(client, seed=1, per_second=1, accepted=[accepted("r1")])
    key = client.store.keys("run", "r1")
    state = client.store.redis.hget(key, "state")
    client.store.redis.hset(key, "state", "completed")
    assert load.open_runs() == []
    client.store.redis.hset(key, "state", state)

    load.ask_again()

    assert load.open_runs() == ["r1"]
