"""A fleet whose processes live until one of their runs kills them: the only place that simulates this.

The scripts are the real ones, in a real Redis. Processes and time are simulated.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.properties.lab import TICK_MS, Lab
from tests.support.script_calls import call

__all__ = ["REAL_SPANS", "TICK_S", "Habit", "LivingFleet"]

TICK_S = 20
REAL_SPANS = (
    (f"EMPTY_WITHIN_MS = {TICK_MS * 3 // 2}", "EMPTY_WITHIN_MS = 60000"),
    (f"MOST_ALONE_MS = {TICK_MS * 5 // 2}", "MOST_ALONE_MS = 600000"),
)
"""For the laboratory of such a fleet: it passes seconds, not ticks of the laboratory."""

NEVER = 10**9


@dataclass(frozen=True)
class Habit:
    """What a run does in each attempt, in ticks of twenty seconds."""

    step: int = 1
    """How long a step takes. A record is committed at its end."""
    steps: int = 1
    """With so many records, the run completes."""
    kills_at: int = NEVER
    """How long an attempt lasts before it ends its process."""


@dataclass
class Attempt:
    fence: str
    ticks: int = 0


@dataclass
class Process:
    incarnation: str
    runs: dict[str, Attempt] = field(default_factory=dict)


class LivingFleet:
    """A supervisor starts a new process a tick after one has died.

    Messages come to the processes in random order. A step that a death interrupts begins again.
    """

    def __init__(self, lab: Lab, processes: int, *, max_recoveries: int, seed: int = 0) -> None:
        self._lab = lab
        self._max_recoveries = max_recoveries
        self._random = random.Random(seed)
        self._numbers = itertools.count()
        self._habits: dict[str, Habit] = {}
        self._processes: list[Process | None] = [None] * processes
        self.records: Counter[str] = Counter()
        self.deaths: Counter[str] = Counter()
        """By the run that has killed."""
        self.ticks = 0

    def submit(self, run_id: str, habit: Habit) -> None:
        self._habits[run_id] = habit
        self._do("submit", run_id=run_id, session_id=f"s-{run_id}")

    def poisoned(self) -> set[str]:
        """The runs that the scripts take for killers: nothing else fails a run here."""
        return self._in_state("failed")

    def completed(self) -> set[str]:
        return self._in_state("completed")

    def _in_state(self, state: str) -> set[str]:
        with self._lab.redis.pipeline(transaction=False) as pipe:
            for run_id in self._habits:
                pipe.hget(self._lab.keys("run", run_id), "state")
            return {run_id for run_id, now in zip(self._habits, pipe.execute(), strict=True) if now == state}

    def play(self) -> None:
        """A tick: processes start, claim what comes, and work; then runs kill them."""
        self.ticks += 1
        self._lab.let_pass(TICK_S * 1000)
        for at, process in enumerate(self._processes):
            if process is None:
                self._processes[at] = self._started()
        self._deliver()
        for at, process in enumerate(self._processes):
            if process and not self._survives(process):
                self._processes[at] = None

    def _living(self) -> Iterator[Process]:
        return (process for process in self._processes if process)

    def _started(self) -> Process:
        process = Process(f"w{next(self._numbers)}")
        self._do("register", incarnation=process.incarnation, lease_ms=10**10)
        return process

    def _deliver(self) -> None:
        while self._do("wake", limit=100)[1]:
            continue
        queued = self._lab.redis.zrange(self._lab.keys("sent", "q"), 0, -1)
        self._random.shuffle(queued)
        for run_id in queued:
            process = self._random.choice(list(self._living()))
            claimed = self._do("claim", run_id=run_id, incarnation=process.incarnation)
            assert claimed.answer in ("CLAIMED", "SUSPECT_BUSY"), f"{run_id}: {claimed.answer}"
            if claimed.answer == "CLAIMED":
                process.runs[run_id] = Attempt(claimed.fence)

    def _survives(self, process: Process) -> bool:
        for run_id, attempt in list(process.runs.items()):
            attempt.ticks += 1
            habit = self._habits[run_id]
            if attempt.ticks % habit.step == 0 and attempt.ticks <= habit.kills_at:
                self._commit(run_id, attempt)
                if self.records[run_id] == habit.steps:
                    self._do("finish", run_id=run_id, fence=attempt.fence)
                    del process.runs[run_id]
        killers = [
            run for run, attempt in process.runs.items() if attempt.ticks >= self._habits[run].kills_at
        ]
        if killers:
            self.deaths[killers[0]] += 1
            self._lab.end_lease(process.incarnation)
            while self._do("reclaim", max_recoveries=self._max_recoveries).incarnation:
                continue
        return not killers

    def _commit(self, run_id: str, attempt: Attempt) -> None:
        self._do(
            "commit",
            run_id=run_id,
            fence=attempt.fence,
            position=self.records[run_id],
            records=[f'{{"call":"{self.records[run_id]}"}}'],
            batch_no=attempt.ticks,
        )
        self.records[run_id] += 1

    def _do(self, script: str, **changed: Any) -> Any:
        return self._lab.run(call(script, **changed))
