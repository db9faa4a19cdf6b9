"""One of many runs kills every process that executes it: the number of deaths, and the effect on other
runs."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import dataclass, field

import pytest

from openagents_worker.store import scripts
from openagents_worker.store.scripts import ClaimAnswer
from tests.properties.lab import Lab

pytestmark = pytest.mark.long

SLOTS = 1_000  # of a worker: all runs find room


@dataclass
class Fleet:
    """Workers that execute runs with the real scripts. A round is a step of every executed run.

    The killer ends its process before any run that was claimed with it has a record: this is the worst case.
    """

    lab: Lab
    killer: str
    runs: list[str]
    deaths: int = 0
    rounds: int = 0
    steps: dict[str, int] = field(default_factory=dict)
    most_at_once: int = 0
    numbers: Generator[int] = field(default_factory=itertools.count)  # type: ignore[assignment]

    def submit(self, run_id: str) -> None:
        self.lab.run(
            scripts.submit(
                run_id=run_id,
                agent_id="a",
                session_id=f"s-{run_id}",
                queue="",
                default_queue="q",
                digest="d",
                uid="u",
                request="{}",
                canvas="",
                durable=True,
                delay_ms=0,
                reject_if_busy=False,
                parent_run_id="",
            )
        )

    def state(self, run_id: str) -> str:
        return str(self.lab.redis.hget(self.lab.keys("run", run_id), "state"))

    def play_round(self, workers: int) -> None:
        """Every worker claims what it gets, then does a step of it, or dies."""
        self.rounds += 1
        self.lab.let_pass(2_000)
        while self.lab.run(scripts.wake(limit=100))[1]:
            pass
        queued = self.lab.redis.zrange(self.lab.keys("sent", "q"), 0, -1)
        attempt_result = [self._claimed(queued[number::workers]) for number in range(workers)]
        self.most_at_once = max(self.most_at_once, *(len(runs) for _, runs in attempt_result))
        for incarnation, runs in attempt_result:
            if self.killer in runs:
                self._die(incarnation)
            else:
                for run_id, fence in runs.items():
                    self._step(run_id, fence)
                self.lab.run(scripts.retire(incarnation=incarnation))

    def _claimed(self, run_ids: list[str]) -> tuple[str, dict[str, str]]:
        incarnation = f"w{next(self.numbers)}"
        self.lab.run(scripts.register(incarnation=incarnation, lease_ms=10_000_000, agents=[]))
        fences: dict[str, str] = {}
        for run_id in run_ids[:SLOTS]:
            claimed = self.lab.run(
                scripts.claim(
                    run_id=run_id, incarnation=incarnation, nonce=f"n{next(self.numbers)}", page_bytes=1000
                )
            )
            assert claimed.answer in (ClaimAnswer.CLAIMED, ClaimAnswer.SUSPECT_BUSY)
            if claimed.answer is ClaimAnswer.CLAIMED:
                fences[run_id] = claimed.fence
        return incarnation, fences

    def _die(self, incarnation: str) -> None:
        self.deaths += 1
        self.lab.end_lease(incarnation, ticks_ago=1 + self.deaths)  # each by itself
        reclaim = scripts.reclaim(limit=100, max_recoveries=5, blameless=False, heartbeat_ms=2_500)
        while self.lab.run(reclaim).incarnation:
            pass

    def _step(self, run_id: str, fence: str) -> None:
        """A record, and the run goes to the next round; after two it ends."""
        position = self.steps[run_id] = self.steps.get(run_id, -1) + 1
        ids = {"run_id": run_id, "fence": fence}
        self.lab.run(
            scripts.commit(**ids, position=position, records=["{}"], usage="{}", batch_no=1, events=[])
        )
        if position == 0:
            self.lab.run(
                scripts.suspend(
                    **ids, kind="handover", delay_ms=0, call="", error_code="", batch_no=2, events=[]
                )
            )
        else:
            self._finish(ids)

    def _finish(self, ids: dict[str, str]) -> None:
        self.lab.run(
            scripts.finish(
                **ids,
                end_state="completed",
                result="{}",
                event="run.completed",
                payload="{}",
                completed="{}",
                transcript=[],
                artifacts=[],
                state=[],
                state_removed=[],
                usage="{}",
                batch_no=2,
                events=[],
            )
        )


@pytest.fixture
def lab(redis_url: str) -> Generator[Lab]:
    lab = Lab(redis_url)
    yield lab
    lab.clear()
    lab.close()


@pytest.mark.parametrize(
    ("number_of_runs", "killer_at", "workers"),
    [
        (120, 0, 1),
        (120, 60, 2),
        (120, 119, 1),
        *(pytest.param(500, at, n, marks=pytest.mark.slow) for at in (0, 250, 499) for n in (1, 2)),
    ],
)
def test_one_of_many_runs_is_found_in_about_nine_deaths(
    lab: Lab, number_of_runs: int, killer_at: int, workers: int
) -> None:
    """Each death halves its group. The other runs complete, and execute in parallel."""
    runs = [f"r{number}" for number in range(number_of_runs)]
    fleet = Fleet(lab, runs[killer_at], runs)
    for run_id in runs:
        fleet.submit(run_id)

    while fleet.state(fleet.killer) != "failed":
        assert fleet.deaths <= 12, "the killer is not found"
        assert fleet.rounds <= 40, "the killer is never carried"
        fleet.play_round(workers)
    while any(fleet.state(run_id) != "completed" for run_id in runs if run_id != fleet.killer):
        assert fleet.rounds <= 60, "the others do not complete"
        fleet.play_round(workers)

    assert 5 <= fleet.deaths <= 12
    assert fleet.rounds <= 40


@pytest.mark.parametrize("new", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_new_runs_are_executed_during_the_search(lab: Lab, new: int) -> None:
    """Many runs arrive in every round; none waits for longer than its group, and none is poisoned."""
    fleet = Fleet(lab, "killer", [])
    fleet.submit("killer")
    rounds_with_new = 0
    while fleet.state("killer") != "failed":
        assert fleet.deaths <= 12, "the killer is not found"
        for number in range(new):
            run_id = f"r{rounds_with_new}-{number}"
            fleet.runs.append(run_id)
            fleet.submit(run_id)
        rounds_with_new += 1
        fleet.play_round(workers=1)
        assert fleet.most_at_once >= new, "the new ones are all carried at once"
    while any(fleet.state(run_id) != "completed" for run_id in fleet.runs):
        assert fleet.rounds <= 3 * rounds_with_new + 10, "the others wait one by one"
        fleet.play_round(workers=1)
