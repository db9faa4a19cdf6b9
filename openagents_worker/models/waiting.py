"""Waiting. The only place that defines what a parked run waits for."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from openagents_worker.models.base import StoredModel

__all__ = ["WaitKind", "Waiting"]


class WaitKind(StrEnum):
    """What ends a wait."""

    APPROVAL = "approval"  # the decision about a tool call
    SIGNAL = "signal"  # a value that is sent to the run
    TIMER = "timer"
    CHILD = "child"  # the end of a child run
    OUTCOME = "outcome"  # a decision about a call whose outcome is unknown
    BUDGET = "budget"  # an extension of a used-up budget
    LIMIT = "limit"  # a limit of the fleet
    JOB = "job"  # a job of a tool in the background of a service


class Waiting(StoredModel):
    """One thing that a parked run waits for.

    `name` is the name of the signal, tool, budget or limit. `until` is the time (UTC) at which the run
    continues without it; None: it has no time-out. `limit` is the limit of a budget that is used up; None
    for other waits, and for runs that a worker of an earlier version has parked.
    """

    kind: WaitKind
    name: str = ""
    call_id: str = ""
    until: datetime | None = None
    limit: float | None = None

    def __str__(self) -> str:
        """The kind and the name: `signal paid`."""
        return f"{self.kind} {self.name}" if self.name else self.kind.value
