"""Seeds: the only place that decides from which run the random values of a place in the program derive.

They derive from the run and from the place, so they are the same in every attempt. A fork answers the calls
up to its checkpoint from the records of its source, so it needs the values of its source until then.
Afterwards it has values of its own: an id that its source has used must not come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openagents_worker.runtime.rules import Rules
from openagents_worker.store.scripts import Claimed

__all__ = ["Seeds"]


@dataclass(frozen=True, slots=True)
class Seeds:
    """The seeds of a run: its own, and those of the runs from which its first records are copied."""

    own: str
    sources: Sequence[tuple[int, str]] = ()
    """The last position that was copied from each of these runs, and its seed. The oldest one is first."""

    @classmethod
    def of(cls, run_id: str, claimed: Claimed) -> Seeds:
        lines = [line.split(" ", 2) for line in claimed.seeds.splitlines()]
        sources = [
            (int(line[0]), _seed(line[2], line[1]))
            for line in lines
            if len(line) == 3 and line[0].isdecimal()  # else another program has written it
        ]
        return cls(_seed(run_id, claimed.uid), sources)

    def at(self, rules: Rules) -> str:
        """The seed of the run that has recorded what the current task does next; the own one if none has."""
        position = rules.next_position() if self.sources else None
        if position is None:
            return self.own
        return next((seed for last, seed in self.sources if position <= last), self.own)


def _seed(run_id: str, uid: str) -> str:
    return f"{run_id}\0{uid}"
