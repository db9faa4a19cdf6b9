"""Counts of calls: the only place that says how many calls a run has made, as its limits count them.

A call inside one that is answered from the journal is not made again. It counts nevertheless: otherwise the
death of a worker would give its run more calls.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from openagents_worker.llm.base import current_call
from openagents_worker.runtime.journal import Record

__all__ = ["ORIGINAL_STEPS", "STEPS", "CallCounts"]

STEPS = "steps"
"""The calls of `call_llm`."""
ORIGINAL_STEPS = "original_steps"
"""The model calls of a run with a pattern of the original SDK."""


class CallCounts:
    """The calls of one attempt, with those that it knows from the journal.

    The outcome in a record has under `STEPS` and `ORIGINAL_STEPS` how many there were in the call, without
    those in calls inside it.
    """

    def __init__(self) -> None:
        self._entered: Counter[str] = Counter()
        self._steps: Counter[str] = Counter()
        self._steps_inside: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def of(self, kind: str) -> int:
        """How many calls of a kind have begun."""
        return self._entered[kind]

    def enter(self, kind: str) -> int:
        """Count a call that begins. Returns its number among those of its kind."""
        self._entered[kind] += 1
        return self._entered[kind]

    def steps(self, name: str = STEPS) -> int:
        """How many steps of this name there were."""
        return self._steps[name]

    def count_step(self, name: str = STEPS) -> int:
        """Count a step, which is perhaps made inside a recorded call. Returns its number."""
        self._steps[name] += 1
        if (call := current_call.get()) is not None:
            self._steps_inside[call.call_id][name] += 1
        return self._steps[name]

    def with_steps(self, call_id: str, outcome: dict[str, object]) -> dict[str, object]:
        """The outcome of a call as it is recorded."""
        steps = self._steps_inside.get(call_id)
        return {**outcome, **steps} if steps else outcome

    def count_steps_of(self, record: Record) -> None:
        """The call with this record is not made again, and neither are its steps."""
        for name in (STEPS, ORIGINAL_STEPS):
            steps = record.outcome.get(name)
            self._steps[name] += steps if type(steps) is int and steps > 0 else 0
