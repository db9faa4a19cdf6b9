"""States. The only place that lists the states of a run, and the reasons why a run ends."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["RunState", "StopReason"]


class StopReason(StrEnum):
    """Why a run ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    MAX_STEPS = "max_steps"
    BUDGET_EXHAUSTED = "budget_exhausted"


class RunState(StrEnum):
    """The state of a run. The last three are terminal.

    From `AWAITING_APPROVAL` to `PAUSED`, the run is parked: it waits for a decision, for another run or for a
    time, and holds no slot of a worker.
    """

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    WAITING_SESSION = "waiting_session"
    RUNNING = "running"
    RETRYING = "retrying"
    AWAITING_APPROVAL = "awaiting_approval"
    WAITING_CHILD = "waiting_child"
    WAITING = "waiting"
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED)
