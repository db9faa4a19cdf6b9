"""The connection between worker and Redis breaks at every command of a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from tests.faults.conftest import TIMES, MakeWorld, strike_at
from tests.support.command_proxy import Proxy
from tests.support.supervised_deployment import World, table

STEPS = 3
CALLS = 2 * STEPS + 1  # of the model and of tools
LEAST = 1 + CALLS + 1  # commands of a run: claim, one per call, finish; batches of events depend on time


class Breaks:
    """Runs of three steps, each with one fault at one command."""

    def __init__(self, world: World, proxy: Proxy) -> None:
        self.world = world
        self.proxy = proxy
        self.rows: list[dict[str, object]] = []
        self._plain = self._answer_of("plain")

    def commands(self) -> list[str]:
        """The names of the commands of a run without a fault."""
        self.proxy.count()
        self._answer_of("counted")
        return [command.name for command in self.proxy.seen]

    def run(self, fault: str, at: int | str) -> bool:
        """Execute a run with the fault at its command of that number, or at the first of that name.

        Returns False if it has no such command.
        """
        met = strike_at(self.world, self.proxy, fault, at)
        run_id = f"{fault.replace(' ', '-')}-{at}"
        answer = self._answer_of(run_id)
        assert answer == self._plain, f"{run_id} at {met}"
        if met:
            begun = self.world.calls(run_id)
            again = len(begun) - len(set(begun))
            assert again <= 1, f"{run_id}: at most the call in flight is repeated"
            self.rows.append(
                {
                    "fault": fault,
                    "command": met[0].number,
                    "name": met[0].name,
                    "calls again": again,
                    "ended": "completed",
                }
            )
        self.world.wait_ready()
        return bool(met)

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
    with Proxy(world.redis.url) as proxy:
        world.redis_url_of = proxy.url_of
        world.start()
        yield Breaks(world, proxy)
        world.end()


def _print_table(breaks: Breaks, commands: list[str]) -> None:
    table(f"The {len(commands)} commands of a run: {', '.join(commands)}", breaks.rows)


def _each(breaks: Breaks, fault: str, numbers: Iterable[int]) -> None:
    for number in numbers:
        if not breaks.run(fault, number):
            return


def test_a_run_outlives_a_break_at_any_command(make_world: MakeWorld) -> None:
    """Wherever the connection breaks, the run has the same result, and no effect is duplicated."""
    with _breaks(make_world, workers=2) as breaks:
        commands = breaks.commands()
        separate_commits = commands.count("commit") - CALLS
        assert separate_commits in (0, 1), (
            "one commit per call; the start is in the first commit or in a separate one"
        )

        for fault, at in (("killed after", "claim"), ("killed before", "finish"), ("killed after", "finish")):
            assert breaks.run(fault, at)
        _each(breaks, "answer lost", range(1, len(commands) + 1, 2))

        _print_table(breaks, commands)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worker_is_killed_before_and_after_every_command(make_world: MakeWorld) -> None:
    """For each command of a run: its worker is killed before Redis gets it, and after Redis has replied."""
    with _breaks(make_world, workers=3) as breaks:
        commands = breaks.commands()

        for fault in ("killed before", "killed after"):
            _each(breaks, fault, itertools.count(1))

        _print_table(breaks, commands)
        assert len(breaks.rows) >= 2 * LEAST


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_answer_to_every_command_is_lost(make_world: MakeWorld) -> None:
    """For each command of a run: Redis has executed it, and the worker only sees its connection break."""
    with _breaks(make_world, workers=2) as breaks:
        commands = breaks.commands()

        _each(breaks, "answer lost", itertools.count(1))

        _print_table(breaks, commands)
        assert len(breaks.rows) >= LEAST
