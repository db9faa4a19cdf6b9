"""The load: producers that submit runs, and cancel some. The only place that knows what was accepted."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from chaos.requests import Plan, plan, simple_plan
from openagents_worker import Client
from openagents_worker.errors import OpenAgentsError, RunNotFound
from openagents_worker.models import RunState
from openagents_worker.store.records import read_states

__all__ = ["Accepted", "Load", "Repeating", "session_order"]

T = TypeVar("T")

MOST_OPEN = 300  # accepted runs that have not ended; the producers wait while there are more
OVER = (RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED)
REPEAT_S = 0.1


@dataclass(slots=True)
class Accepted:
    """A run that Redis has accepted."""

    run_id: str
    session_id: str
    plan: Plan
    at: float
    """When `submit` returned, by the monotonic clock."""
    cancelled: bool = False
    """Whether somebody has asked to cancel it."""


@dataclass(slots=True)
class Repeating:
    """Repeats operations that the library says may be repeated, and keeps what may not happen."""

    problems: list[str] = field(default_factory=list)
    """Answers that a producer must not get."""
    repeated: Counter[str] = field(default_factory=Counter)
    """How often an operation was repeated, by the code of the error."""

    def until_answered(self, operation: Callable[[], T]) -> T:
        """The answer of an operation that may be repeated, as every operation of this library may."""
        while True:
            try:
                return operation()
            except OpenAgentsError as error:
                if not error.retryable:
                    raise
                self.repeated[error.code] += 1
                time.sleep(REPEAT_S)


@dataclass(slots=True)
class Load:
    """Submits about `per_second` runs a second until `stop`. The same seed submits the same runs."""

    client: Client
    seed: int
    per_second: float
    repeating: Repeating = field(default_factory=Repeating)
    accepted: list[Accepted] = field(default_factory=list)
    _ended: set[str] = field(default_factory=set)
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def warm_up(self, runs: int) -> None:
        """Submit this many runs that wait for nobody, and wait until they have ended."""
        chance = random.Random(self.seed + 2)
        for number in range(runs):
            kind = "branches" if chance.random() < 0.15 else "steps"
            self._submit(f"warm-{number}", f"warm-{number}", simple_plan(chance, kind))
        while self.open_runs():
            time.sleep(REPEAT_S)

    def start(self) -> None:
        for target in (self._submit_all, self._cancel_some):
            self._threads.append(threading.Thread(target=target, name=target.__name__))
            self._threads[-1].start()

    def stop(self) -> None:
        """Submit nothing more; returns when the producers have ended."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def open_runs(self) -> list[str]:
        """The accepted runs that exist and have not ended. Asks Redis, and repeats that until it answers."""
        ids = [run.run_id for run in list(self.accepted) if run.run_id not in self._ended]
        for at in range(0, len(ids), 500):
            states = self.repeating.until_answered(
                partial(read_states, self.client.store, ids[at : at + 500])
            )
            self._ended |= {run_id for run_id, state in states.items() if state is None or state in OVER}
        return [run_id for run_id in ids if run_id not in self._ended]

    def ask_again(self) -> None:
        """Forget which runs have ended: Redis may have lost the end of a run since."""
        self._ended.clear()

    # --- producers ---------------------------------------------------------------------------------------

    def _submit_all(self) -> None:
        chance = random.Random(self.seed)
        number = 0
        while not self._over.is_set():
            session = f"s{number}"
            for place in range(chance.choice((1, 1, 1, 1, 2, 3, 5))):
                number += 1
                self._submit(f"r{number}", session, plan(chance, is_first=place == 0))
                self._over.wait(chance.expovariate(self.per_second))
            if number % 20 == 0:
                while len(self.open_runs()) > MOST_OPEN and not self._over.wait(0.5):
                    pass

    def _submit(self, run_id: str, session: str, plan: Plan) -> None:
        request = {
            "agent_id": plan.agent_id,
            "session_id": session,
            "input_text": plan.input_text,
            "run_id": run_id,
            "on_busy": plan.on_busy,
        }
        try:
            self.repeating.until_answered(lambda: self.client.submit(request))
        except OpenAgentsError as error:
            self.repeating.problems.append(f"submit {run_id}: {error.code}: {error}")
        else:
            self.accepted.append(Accepted(run_id, session, plan, time.monotonic()))

    def _cancel_some(self) -> None:
        chance = random.Random(self.seed + 1)
        while not self._over.wait(chance.expovariate(self.per_second / 20)):
            if not self.accepted:
                continue
            run = self.accepted[-1 - int(chance.random() * min(len(self.accepted), 15))]
            run.cancelled = True
            try:
                self.repeating.until_answered(partial(self.client.cancel, run.run_id))
            except RunNotFound:
                pass  # the audit finds every lost run, cancelled or not
            except OpenAgentsError as error:
                self.repeating.problems.append(f"cancel {run.run_id}: {error.code}: {error}")


def session_order(accepted: list[Accepted]) -> dict[str, list[Accepted]]:
    """The runs of each session that has more than one, in the order in which they were accepted."""
    sessions: dict[str, list[Accepted]] = {}
    for run in accepted:
        sessions.setdefault(run.session_id, []).append(run)
    return {session: runs for session, runs in sessions.items() if len(runs) > 1}
