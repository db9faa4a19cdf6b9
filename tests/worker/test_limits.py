"""Limits of the fleet with two worker processes, a real model server, and a worker that is killed."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any

import pytest

from openagents_worker.local.child_process import ChildProcess
from openagents_worker.models import RunState
from openagents_worker.producer.handle import RunHandle
from tests.support.deployment import PATIENCE_S, Installation, agent, installed, story
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

AT_ONCE = 2


class Gate:
    """The model's view of the requests: which are in flight, and the order in which they arrived."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.arrived: list[str] = []
        self.in_flight: set[str] = set()
        self.answered: set[str] = set()
        self.most = 0

    def may_answer(self, run_id: str) -> bool:
        """Called again and again while the request of the run waits for its reply."""
        with self.lock:
            if run_id not in self.arrived:
                self.arrived.append(run_id)
                self.in_flight.add(run_id)
                self.most = max(self.most, len(self.in_flight))
            if run_id in self.answered:
                self.in_flight.discard(run_id)
                return True
            return False

    def answer(self, run_id: str) -> None:
        with self.lock:
            self.answered.add(run_id)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Installation, ChildProcess]]:
    limited = {"limits": {"key": "shared", "max_concurrency": AT_ONCE}}
    with installed(tmp_path_factory.mktemp("limits"), agent("clerk", llm=limited)) as installation:
        other = installation.stack.start_worker("other")
        wait_for(lambda: len(installation.client.workers()) == 2, "both workers are registered")
        yield installation, other


def _served_at(handle: RunHandle[Any]) -> float:
    """When the limit had a place for the run, by the clock of Redis; 0: it never waited."""
    woken = [event.timestamp.timestamp() for event in story(handle) if event.name == "run.woken"]
    return woken[0] if woken else 0.0


def submitted(both: Any, tenant: str, count: int) -> list[RunHandle[Any]]:
    return [both[0].submit("clerk", tenant=tenant) for _ in range(count)]


def test_two_workers_never_exceed_the_limit_and_serve_tenants_in_turn(both: Any) -> None:
    """One tenant floods; the runs of the other one, submitted later, are served among its first ones."""
    gate = Gate()
    both[0].model.may_answer = gate.may_answer
    both[0].model.will_say({"text": "fine"})
    flood = submitted(both, "flood", 8)
    queue = both[0].client.store.keys("limit_queue", "shared")
    redis = both[0].client.store.redis
    wait_for(lambda: redis.zcard(queue) == len(flood) - AT_ONCE, "all others are parked")
    other = submitted(both, "other", 2)
    wait_for(lambda: redis.zcard(queue) == len(flood) - AT_ONCE + len(other), "the others wait, too")

    for number in range(len(flood) + len(other)):
        wait_for(lambda number=number: len(gate.arrived) > number, "the next request has arrived")
        gate.answer(gate.arrived[number])
    results = [handle.wait(PATIENCE_S) for handle in (*flood, *other)]

    assert {result.final_output for result in results} == {"fine"}
    assert gate.most <= AT_ONCE
    served = {handle.id: _served_at(handle) for handle in (*flood, *other)}
    for late in other:  # in turn with the flood, of which some were served without waiting
        earlier = [one for one in flood if served[one.id] and served[one.id] < served[late.id]]
        assert len(earlier) <= len(other)
    assert "llm.limited" in [event.name for event in story(other[0])]


def test_the_requests_of_a_killed_worker_are_available_again(both: Any) -> None:
    """It is killed with a request in flight: its run continues elsewhere, and runs that wait are served."""
    installation, other = both
    gate = Gate()
    installation.model.may_answer = gate.may_answer
    handles = submitted(both, "t", 4)
    wait_for(lambda: len(gate.arrived) == AT_ONCE, "two requests have arrived")
    owner = installation.client.record(gate.arrived[0]).worker
    [pid] = [worker.pid for worker in installation.client.workers() if worker.incarnation == owner]

    [dead] = [worker for worker in (installation.worker, other) if worker.pid == pid]
    dead.kill()
    for handle in handles:
        gate.answer(handle.id)

    assert {handle.wait(PATIENCE_S).final_output for handle in handles} == {"fine"}
    assert {handle.record().state for handle in handles} == {RunState.COMPLETED}
