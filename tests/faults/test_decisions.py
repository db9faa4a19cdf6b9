"""People decide about calls while workers are killed: each effect happens exactly as it was decided."""

from __future__ import annotations

import random
import signal
from collections.abc import Generator
from functools import partial

import pytest

from openagents_worker import Approval, ApprovalNotPending, Decision
from openagents_worker.models import RunState
from tests.support.supervised_deployment import World
from tests.support.waiting import wait_for

KILLED_IN_A_CALL = 0.1  # of the runs: while their payment is in flight
KILLED_AT_RANDOM = 0.05  # workers for each run
KILL_CHANCE = 0.1  # each time the person looks at what waits
STORM_S = 600  # within which all runs of a storm end


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    folder = tmp_path_factory.mktemp("decisions")
    with World(folder, workers=3, env={"OPENAGENTS_MAX_RECOVERIES": "50"}) as world:
        yield world.start()


def paid(world: World, run_id: str) -> list[dict[str, object]]:
    """The effects of a run, from the log of the tool."""
    return [entry for entry in world.entries(run_id) if entry["event"] == "paid"]


def is_paused(world: World, run_id: str) -> bool:
    return world.record(run_id).state is RunState.PAUSED


@pytest.mark.share(of=2)
@pytest.mark.parametrize(("tool", "call"), [("pay", "pay"), ("pay_in_function", "payment")])
def test_a_payment_whose_worker_is_killed_waits_for_a_person(world: World, tool: str, call: str) -> None:
    """Killed before the effect, it is made again. Killed after it, its result is given by the person. The
    payment is a call of a tool, or of a recorded function inside it."""
    unpaid, done = f"unpaid-{call}", f"paid-{call}"
    world.mark(unpaid, "p.begin")
    world.mark(done, "p.end")
    for run_id in (unpaid, done):  # one after the other: a worker that both use would be killed early
        world.submit(run_id, [(tool, {"n": "p"})], agent="careful")
        wait_for(partial(is_paused, world, run_id), f"{run_id} waits for a person")
    assert [len(paid(world, run_id)) for run_id in (unpaid, done)] == [0, 1]

    world.client.resolve(unpaid, call, "rerun", by="anna")
    world.client.resolve(done, call, "skip", by="anna", result={"receipt": 17})

    for run_id in (unpaid, done):
        assert world.wait(run_id).final_output == "done after 1"
        world.assert_complete_events(run_id)
    assert [len(paid(world, run_id)) for run_id in (unpaid, done)] == [1, 1]
    assert len({entry["key"] for entry in world.entries(unpaid)}) == 1


@pytest.mark.long
def test_a_worker_that_comes_back_with_the_outcome_answers_the_question(world: World) -> None:
    """It was stopped for longer than its lease while it paid. The run waits for a person until then."""
    world.submit("stopped", [("pay", {"n": "p", "ms": 500})], agent="careful")
    wait_for(lambda: world.entries("stopped"), "the payment begins")
    worker = world.owner("stopped")
    worker.signal(signal.SIGSTOP)
    try:
        wait_for(partial(is_paused, world, "stopped"), "the run waits for a person")
    finally:
        worker.signal(signal.SIGCONT)

    assert world.wait("stopped").final_output == "done after 1"

    assert len(paid(world, "stopped")) == 1
    events = world.assert_complete_events("stopped")
    (resolved,) = [event for event in events if event.name == "tool.outcome_resolved"]
    assert (resolved.payload["by"], resolved.payload["action"]) == ("late_outcome", "outcome")


class Storm:
    """Runs that each ask for one approval, and a person who decides at random moments or not at all."""

    def __init__(self, world: World, count: int, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.runs = [f"storm-{seed}-{number}" for number in range(count)]
        self.decisions: dict[str, Decision] = {}
        """The first decision about each call, as the system has told it."""
        self.wishes = {
            run_id: self.random.choice(["approve", "approve", "edit", "deny", "twice", "nothing"])
            for run_id in self.runs
        }
        self._kills = round(count * KILLED_AT_RANDOM)

    def begin(self) -> None:
        for run_id in self.runs:
            if self.random.random() < KILLED_IN_A_CALL:
                self.world.mark(run_id, self.random.choice(["p.begin", "p.paid", "p.end"]))
            self.world.submit(run_id, [("settle", {"n": "p", "cents": 5})], agent="careful")

    def go_on(self) -> bool:
        """Decide about some calls, and sometimes kill a worker. Returns whether every run has ended."""
        for approval in self.world.client.approvals(limit=1000):
            if approval.run_id in self.wishes and self.random.random() < 0.5:
                self.decide(approval)
        if self._kills and self.random.random() < KILL_CHANCE and (ready := self.world.ready()):
            self._kills -= 1
            self.world.kill(self.random.choice(ready))
        return all(self.world.record(run_id).state.is_terminal for run_id in self.runs)

    def decide(self, approval: Approval) -> None:
        wish = self.wishes[approval.run_id]
        for action in {"twice": ["approve", "deny"], "nothing": []}.get(wish, [wish]):
            ids = approval.run_id, approval.call_id
            client = self.world.client
            try:
                if action == "deny":
                    decision = client.deny(*ids, by="anna", note="no")
                else:
                    edited = {"n": "p", "cents": 7} if action == "edit" else None
                    decision = client.approve(*ids, by="anna", arguments=edited)
            except ApprovalNotPending as error:
                decision = error.decision
                assert decision is not None or client.record(approval.run_id).state.is_terminal
            if decision is not None:
                first = self.decisions.setdefault(approval.run_id, decision)
                assert (first.action, first.at) == (decision.action, decision.at), "the first one counts"

    def check(self) -> None:
        """Each effect is exactly that of the decision: once with its arguments, or not at all."""
        for run_id in self.runs:
            assert self.world.wait(run_id).final_output == "done after 1", run_id
            decision = self.decisions.get(run_id)
            effects = paid(self.world, run_id)
            if decision is None or decision.action == "deny":
                assert effects == [], f"{run_id}: {decision}"
            else:
                cents = decision.arguments["cents"] if decision.arguments else 5
                assert len(effects) == 1, f"{run_id}: {decision}"
                assert effects[0]["cents"] == cents
            names = [event.name for event in self.world.assert_complete_events(run_id)]
            assert sum(name in ("tool.approved", "tool.denied") for name in names) == 1, run_id


def storm(world: World, count: int, seed: int) -> None:
    told = Storm(world, count, seed)
    told.begin()
    wait_for(told.go_on, f"{count} runs have ended", STORM_S)
    told.check()


@pytest.mark.long
@pytest.mark.timeout(STORM_S + 60)
def test_each_effect_is_as_decided_whatever_dies_meanwhile(world: World) -> None:
    """60 approvals, decided at random moments around kills and time-outs."""
    storm(world, 60, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(STORM_S + 60)
@pytest.mark.parametrize("seed", range(2, 12))
def test_a_thousand_effects_are_as_decided(world: World, seed: int) -> None:
    """1,000 approvals in ten storms."""
    storm(world, 100, seed)
