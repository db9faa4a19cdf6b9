"""Workers are killed while children work in the session of their parent.

The session gets the turns of all of them with the end of the parent, each once and in order, or none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from openagents_worker.models import RunState
from tests.faults.breaks import breaks_in
from tests.faults.conftest import MakeWorld, runs_below
from tests.support.supervised_deployment import World, table
from tests.support.waiting import wait_for

HEARD = [[[], ["one"]], [["one"], ["one", "two"]]]
"""What the lender hears from each borrower: the questions that it has seen, and the state of the session."""
STEPS = ("before", "one", "after one", "two", "after two")
FAULTS = ("killed before", "killed after", "answer lost")
SCRIPTS = {"delegate": 2, "suspend": 1, "claim": 3, "finish": 3}
"""The scripts with which children begin, are waited for and end. A run executes each at least so often."""


class _Lending:
    """Runs that lend their session. What is in the session is read all the time."""

    def __init__(self, world: World, text: str) -> None:
        self.world, self.text = world, text

    def execute(self, run_id: str) -> dict[str, Any]:
        """Execute a run. Its row says how many steps were repeated."""
        self.world.submit(run_id, agent="lender", text=self.text)
        wait_for(lambda: self._has_ended(run_id), f"{run_id} has ended", 60)
        runs = [self.world.record(run_id), *runs_below(self.world, run_id)]
        assert len(runs) == 3
        fails = self.text == "fail"
        if fails:
            assert [run.state for run in runs].count(RunState.FAILED) == 1
            assert self._session(run_id) == ([], {})
        else:
            assert self.world.wait(run_id).final_output == HEARD
            messages, state = self._session(run_id)
            assert [messages[at] for at in (0, 2, 4)] == ["one", "two", "complete"], "the questions, in order"
            assert len(messages) == 6, "each turn once"
            assert state == {"lender": "before", "borrowers": ["one", "two"]}
        for run in runs:
            ending = "run.failed" if fails and run.run_id == run_id else "run.completed"
            self.world.assert_complete_events(run.run_id, ending)
        recoveries = sum(run.recoveries for run in runs)
        return {"run": run_id, "recoveries": recoveries, "steps again": self._steps_again(runs, recoveries)}

    def _has_ended(self, run_id: str) -> bool:
        """Whether the run has ended; until then its session has nothing of it."""
        messages, state = self._session(run_id)
        if self.world.record(run_id).state.is_terminal:
            return True
        assert (messages, state) == ([], {}), "a turn is in the session before the run has ended"
        return False

    def _session(self, run_id: str) -> tuple[list[str], dict[str, Any]]:
        view = self.world.client.session(f"session-of-{run_id}")
        own = {name: value for name, value in view.state.items() if name in ("lender", "borrowers")}
        return [str(entry["content"]) for entry in view.transcript], own

    def _steps_again(self, runs: Iterable[Any], recoveries: int) -> int:
        ids = {run.run_id for run in runs}
        ended = [e["n"] for e in self.world.entries() if e["run"] in ids and e["event"] == "end"]
        assert set(ended) == set(STEPS)
        again = len(ended) - len(STEPS)
        assert again <= recoveries, "a kill repeats at most the call in flight"
        return again


@pytest.mark.long
@pytest.mark.parametrize(
    ("text", "fault"),
    [("complete", "killed before"), ("complete", "answer lost"), ("fail", "killed after")],
)
def test_a_session_gets_the_turns_of_shared_children_once_or_not_at_all(
    make_world: MakeWorld, text: str, fault: str
) -> None:
    """At each script with which children begin, are waited for and end."""
    world = make_world(workers=2)
    with breaks_in(world, _Lending(world, text).execute) as breaks:
        for script, least in SCRIPTS.items():
            assert breaks.at_every(fault, script) >= least, script
        table("A break at the scripts of shared children", breaks.rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("text", ["complete", "fail"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_break_at_every_command_of_shared_children(make_world: MakeWorld, fault: str, text: str) -> None:
    world = make_world(workers=3)
    with breaks_in(world, _Lending(world, text).execute) as breaks:
        least = len(breaks.commands()) * 2 // 3  # batches of events depend on time
        breaks.at_every_command(fault)
        table("A break at every command of shared children", breaks.rows)
        assert len(breaks.rows) >= least
