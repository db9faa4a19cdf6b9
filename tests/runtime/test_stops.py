"""Stops: a worker that stops a thousand runs at once does not block its loop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import pytest

from openagents_worker.producer.client import cell_of
from openagents_worker.runtime.latch import Latch, LatchReason
from openagents_worker.runtime.runner import Runner
from openagents_worker.runtime.stops import STOPS_PER_ITERATION, Stops
from openagents_worker.settings import load_settings
from openagents_worker.store.client import AsyncStore
from openagents_worker.worker.control_channel import BURST, ControlChannel
from tests.runtime.test_replay import patterned
from tests.support.runner import process
from tests.support.waiting import await_for

RUNS = 1000


class Turns:
    """Counts what happens in each turn of the event loop."""

    def __init__(self) -> None:
        self._number = 0
        self._counts: Counter[int] = Counter()
        self._goes_on = True
        self._next()

    def _next(self) -> None:
        self._number += 1
        if self._goes_on:
            asyncio.get_running_loop().call_soon(self._next)

    def count(self, *_: object) -> None:
        self._counts[self._number] += 1

    def most(self) -> int:
        """The largest number of events of this kind in one turn."""
        self._goes_on = False
        return max(self._counts.values())

    def all(self) -> int:
        return self._counts.total()


class Counted(Latch):
    """A latch that records when its run is stopped."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns

    def set(self, reason: LatchReason, **why: Any) -> None:
        self._turns.count()
        super().set(reason, **why)

    def hurry(self) -> None:
        self._turns.count()
        super().hurry()


class Attempted:
    """A run as the runner sees it."""

    def __init__(self, turns: Turns) -> None:
        self.latch = Counted(turns)

    def interrupt(self, _: BaseException) -> None:
        self.latch.set(LatchReason.TIME_LIMIT)


def _cancel(runner: Runner) -> None:
    for number in range(RUNS):
        runner.latch(f"r{number}", LatchReason.CANCELLED)


def _interrupt(runner: Runner) -> None:
    for number in range(RUNS):
        runner.interrupt(f"r{number}", TimeoutError())


def _all(stop: Callable[[Runner], Any]) -> Callable[[Runner], object]:
    def begin(runner: Runner) -> object:
        runner.stopping = asyncio.create_task(stop(runner))  # type: ignore[attr-defined]
        return runner

    return begin


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(_cancel, id="cancelled"),
        pytest.param(_all(lambda runner: runner.latch_all(LatchReason.HANDOVER)), id="handed over"),
        pytest.param(_all(lambda runner: runner.hurry_all()), id="hurried"),
        pytest.param(_interrupt, id="soft time limit"),
    ],
)
async def test_few_runs_are_stopped_in_one_turn_of_the_loop(
    redis_url: str, stop: Callable[[Runner], object]
) -> None:
    """The rest of the work follows in later turns, a few runs per turn, and the loop stays free."""
    async with process(redis_url, patterned("Steps")) as p:
        turns = Turns()
        p.runner._attempts = {f"r{number}": cast(Any, Attempted(turns)) for number in range(RUNS)}
        p.runner._idle.set()

        stop(p.runner)

        await await_for(lambda: turns.all() == RUNS, "every run is stopped")
        assert turns.most() <= STOPS_PER_ITERATION
        p.runner._attempts = {}


async def test_runs_that_others_may_own_stop_at_once(redis_url: str) -> None:
    """The lease is over: no run may write any more, even if that blocks the loop."""
    async with process(redis_url, patterned("Steps")) as p:
        attempts = [Attempted(Turns()) for _ in range(RUNS)]
        p.runner._attempts = {str(number): cast(Any, each) for number, each in enumerate(attempts)}
        p.runner._idle.set()
        p.runner.latch("0", LatchReason.CANCELLED)

        await p.runner.latch_all(LatchReason.FENCED)

        assert {each.latch.reason for each in attempts} == {LatchReason.FENCED}
        p.runner._attempts = {}


async def test_one_run_is_stopped_at_once() -> None:
    """If several wait, they are stopped in order."""
    stops, stopped = Stops(), []
    for number in range(STOPS_PER_ITERATION):
        stops.call(lambda number=number: stopped.append(number))  # type: ignore[misc]
    assert stopped == [*range(STOPS_PER_ITERATION)]

    stops.call(lambda: stopped.append("late"))
    await asyncio.sleep(0)
    stops.call(lambda: stopped.append("later"))

    assert stopped[STOPS_PER_ITERATION:] == ["late", "later"]


async def test_a_thousand_cancellations_are_read_in_small_bursts(redis_url: str) -> None:
    """The messages of a connection are not all read in one turn of the loop."""
    cell = cell_of(load_settings({"OPENAGENTS_REDIS_URL": redis_url}))
    turns: Turns | None = None

    def hear(run_id: str) -> None:
        if run_id and turns is not None:
            turns.count()

    store, notices = AsyncStore(cell), ControlChannel(cell, on_notice=hear)
    channel = store.keys.notices("w:1")
    try:
        notices.follow("w:1")

        async def is_heard() -> bool:
            return bool(await store.ask(lambda r: r.publish(channel, "")))

        await await_for(is_heard, "it listens")
        turns = Turns()
        async with store.redis.pipeline(transaction=False) as pipeline:
            for number in range(RUNS):
                pipeline.publish(channel, f"r{number}")
            await store.ask(lambda _: pipeline.execute())
        await await_for(lambda: turns is not None and turns.all() == RUNS, "all are heard")
        assert turns.most() <= BURST
    finally:
        await notices.aclose()
        await store.close()
