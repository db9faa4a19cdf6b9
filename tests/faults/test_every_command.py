"""The connection between worker and Redis breaks at every command of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.faults.breaks import Breaks, breaks_in
from tests.faults.conftest import TIMES, MakeWorld
from tests.support.supervised_deployment import World, table

STEPS = 3
CALLS = 2 * STEPS + 1  # of the model and of tools
LEAST = 1 + CALLS + 1  # commands of a run: claim, one per call, finish; batches of events depend on time


class _Steps:
    """Runs of three steps. Each has the result of the first one."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._plain: dict[str, object] | None = None

    def execute(self, run_id: str) -> dict[str, object]:
        """Execute a run. Its row says how many calls were repeated."""
        answer = self._answer_of(run_id)
        self._plain = self._plain or answer  # the first run is counted: it meets no fault
        assert answer == self._plain, run_id
        begun = self.world.calls(run_id)
        again = len(begun) - len(set(begun))
        assert again <= 1, f"{run_id}: at most the call in flight is repeated"
        return {"calls again": again, "ended": "completed"}

    def _answer_of(self, run_id: str) -> dict[str, object]:
        self.world.submit(run_id, [("step", {"n": n}) for n in range(STEPS)])
        result = self.world.wait(run_id)
        self.world.assert_complete_events(run_id)
        view = self.world.client.session(f"session-of-{run_id}")
        assert len(view.transcript) == 2
        return {
            "stop_reason": result.stop_reason,
            "answer": result.final_output,
            "done": view.state["done"],
            "usage": result.usage.model_dump(exclude=TIMES),
        }


@contextmanager
def _breaks(make_world: MakeWorld, workers: int) -> Iterator[Breaks]:
    world = make_world(workers=workers)
    steps = _Steps(world)
    with breaks_in(world, steps.execute) as breaks:
        steps.execute("plain")  # the first one sends more: it stores the definition of the agent
        yield breaks


def _print_table(breaks: Breaks, commands: list[str]) -> None:
    table(f"The {len(commands)} commands of a run: {', '.join(commands)}", breaks.rows)


def test_a_run_outlives_a_break_at_any_command(make_world: MakeWorld) -> None:
    """Wherever the connection breaks, the run has the same result, and no effect is duplicated."""
    with _breaks(make_world, workers=2) as breaks:
        commands = breaks.commands()
        separate_commits = commands.count("commit") - CALLS
        assert separate_commits in (0, 1), (
            "one commit per call; the start is in the first commit or in a separate one"
        )

        for fault, at in (("killed after", "claim"), ("killed before", "finish"), ("killed after", "finish")):
            assert breaks.at(fault, at)
        for number in range(1, len(commands) + 1, 2):
            if not breaks.at("answer lost", number):
                break

        _print_table(breaks, commands)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worker_is_killed_before_and_after_every_command(make_world: MakeWorld) -> None:
    """For each command of a run: its worker is killed before Redis gets it, and after Redis has replied."""
    with _breaks(make_world, workers=3) as breaks:
        commands = breaks.commands()

        for fault in ("killed before", "killed after"):
            breaks.at_every_command(fault)

        _print_table(breaks, commands)
        assert len(breaks.rows) >= 2 * LEAST


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_answer_to_every_command_is_lost(make_world: MakeWorld) -> None:
    """For each command of a run: Redis has executed it, and the worker only sees its connection break."""
    with _breaks(make_world, workers=2) as breaks:
        commands = breaks.commands()

        breaks.at_every_command("answer lost")

        _print_table(breaks, commands)
        assert len(breaks.rows) >= LEAST
