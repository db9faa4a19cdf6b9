"""Working budgets: the only place that says which limits a run has now, after extensions."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from openagents_worker.models import EXTENDABLE, RunBudget
from openagents_worker.runtime.clock import RunClock

__all__ = ["TIME", "WorkingBudget", "limits_in"]

TIME = "max_duration_ms"


class WorkingBudget:
    """The limits of a run: those of its request and its agent, raised by the extensions that it has taken."""

    def __init__(self, budget: RunBudget, *, durable: bool) -> None:
        """A run that is not durable never waits for an extension, because it would lose its work."""
        self.pauses = budget.on_breach == "pause" and durable
        self.extended: dict[str, float] = {}
        """The largest value of each limit in the extensions."""
        self.extending = asyncio.Lock()
        """Held by the call that takes an extension, if the budget does not pause the run."""
        self.clock: RunClock | None = None
        """The time of the run, if it is limited. Set before the first call."""
        self._budget = budget

    def limit(self, name: str) -> Any:
        """The limit with this name in `EXTENDABLE`; None: no limit."""
        limit = getattr(self._budget, name)
        return None if limit is None else max(limit, self.extended.get(name, limit))

    def extend(self, limits: Mapping[str, float]) -> None:
        """Take an extension. A limit is never lowered."""
        for name, limit in limits.items():
            self.extended[name] = max(limit, self.extended.get(name, limit))
        if self.clock is not None:  # the deadline of the attempt, too
            self.clock.extend(limits.get(TIME))


def limits_in(value: Any) -> dict[str, float]:
    """The limits of a stored extension. What is not a limit is left out."""
    found = value if isinstance(value, Mapping) else {}
    return {
        name: found[name]
        for name in EXTENDABLE
        if isinstance(found.get(name), int | float) and not isinstance(found[name], bool)
    }
