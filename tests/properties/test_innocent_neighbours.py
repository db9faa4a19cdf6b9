"""Runs that kill their process again and again although they commit steps, beside runs that do nothing
wrong."""

from __future__ import annotations

from collections.abc import Generator
from itertools import product

import pytest

from tests.properties.lab import Lab
from tests.properties.living_fleet import REAL_SPANS, Habit, LivingFleet

LONG_CALL = Habit(step=15)  # a model call of five minutes
GROWS = Habit(steps=10**6, kills_at=3)  # each attempt commits steps; then the memory of the process is full
KILLS_AT_ONCE = Habit(step=3, kills_at=1)  # it dies before its first record
WORKS = Habit(steps=10**6)  # commits a step in every tick


@pytest.fixture
def lab(redis_url: str) -> Generator[Lab]:
    lab = Lab(redis_url, REAL_SPANS)
    yield lab
    lab.clear()
    lab.close()


def _play_until_all_complete(fleet: LivingFleet, runs: list[str], most_ticks: int) -> None:
    """None of these runs is poisoned, and they complete while the killers go on."""
    while not fleet.completed() >= set(runs):
        fleet.play()
        assert not fleet.poisoned() & set(runs), f"poisoned after {fleet.deaths.total()} deaths"
        assert fleet.ticks < most_ticks, f"{set(runs) - fleet.completed()} have not completed"


@pytest.mark.share(of=7)
@pytest.mark.parametrize(
    ("killers", "innocents", "max_recoveries", "processes"),
    list(product((1, 3), (1, 3, 10), (1, 2, 3), (1, 2))),
)
def test_a_run_is_not_poisoned_for_killers_that_commit_steps(
    lab: Lab, killers: int, innocents: int, max_recoveries: int, processes: int
) -> None:
    """A run in a long call has no record at any of the deaths, and is the only suspect each time.

    It is executed alone before it can be poisoned, so its call ends.
    """
    fleet = LivingFleet(lab, processes, max_recoveries=max_recoveries)
    runs = [f"innocent{number}" for number in range(innocents)]
    for run_id in runs:
        fleet.submit(run_id, LONG_CALL)
    for number in range(killers):
        fleet.submit(f"killer{number}", GROWS)

    _play_until_all_complete(fleet, runs, most_ticks=100 + 60 * innocents)

    assert fleet.deaths.total() > max_recoveries
    assert not fleet.poisoned(), "a killer that commits steps is not poisoned"


def test_a_run_is_not_poisoned_for_killers_that_arrive_one_after_another(lab: Lab) -> None:
    """Each death has another cause: no run but the innocent one has seen two of them."""
    fleet = LivingFleet(lab, 1, max_recoveries=2)
    fleet.submit("innocent", LONG_CALL)
    for number in range(60):
        fleet.submit(f"killer{number}", Habit(steps=5, kills_at=3))
        for _ in range(2):
            fleet.play()
        assert "innocent" not in fleet.poisoned(), f"poisoned after {fleet.deaths.total()} deaths"
        if "innocent" in fleet.completed():
            break

    assert "innocent" in fleet.completed()
    assert fleet.deaths.total() > 2, "the limit was reached"


@pytest.mark.parametrize(("others", "new", "processes"), [(1, 0, 1), (30, 0, 1), (30, 2, 1), (30, 2, 2)])
def test_a_run_that_kills_at_once_is_found_on_a_busy_worker(
    lab: Lab, others: int, new: int, processes: int
) -> None:
    """All other runs commit steps all the time, so each of them could have been the cause."""
    fleet = LivingFleet(lab, processes, max_recoveries=3)
    for number in range(others):
        fleet.submit(f"works{number}", WORKS)
    fleet.submit("killer", KILLS_AT_ONCE)

    while "killer" not in fleet.poisoned():
        for number in range(new):
            fleet.submit(f"new{fleet.ticks}-{number}", Habit(steps=4))
        fleet.play()
        assert fleet.deaths.total() <= 5, "it is not found with one death more than without company"
        assert fleet.ticks < 40, "it is not executed"

    assert fleet.poisoned() == {"killer"}


@pytest.mark.parametrize("max_recoveries", [1, 3, 5])
def test_both_kinds_of_killers_and_a_long_call(lab: Lab, max_recoveries: int) -> None:
    """Only the run that never commits a step is poisoned, in spite of many deaths with other causes."""
    fleet = LivingFleet(lab, 2, max_recoveries=max_recoveries)
    fleet.submit("innocent", LONG_CALL)
    fleet.submit("grows", GROWS)
    fleet.submit("killer", KILLS_AT_ONCE)

    _play_until_all_complete(fleet, ["innocent"], most_ticks=300)
    while "killer" not in fleet.poisoned():
        fleet.play()
        assert fleet.deaths["killer"] <= max_recoveries + 3, "it is not found"
        assert fleet.ticks < 300, "it is not executed"

    assert fleet.poisoned() == {"killer"}
