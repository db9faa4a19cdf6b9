"""Records. The only place that defines what is known about a run: its state, counters and times."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from openagents_worker.models.base import StoredModel
from openagents_worker.models.error_details import ErrorDetails
from openagents_worker.models.request import RunRequest
from openagents_worker.models.result import RunResult
from openagents_worker.models.states import RunState
from openagents_worker.models.usage import RunUsage
from openagents_worker.models.waiting import Waiting

__all__ = ["RunRecord"]


class RunRecord(StoredModel):
    """The current state of a run in Redis. Times are milliseconds since 1970 by the clock of Redis.

    `retries` counts the retries after retryable errors in all lives; `last_error` is the last of these
    errors. `waiting` is what a parked run waits for; `due_ms` is then the earliest time at which it continues
    by itself. `duration_ms` is the sum of all finished attempts. It does not include waiting times (in a
    queue, for the session, for a retry, parked).
    """

    run_id: str  # not an `Id`: a message from outside may contain an invalid id, and its run fails
    agent_id: str
    session_id: str
    queue: str
    state: RunState
    life: int = 1
    attempt: int = 0
    steps: int = 0
    retries: int = 0
    recoveries: int = 0
    worker: str | None = None
    cancel_requested: bool = False
    created_ms: int | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    due_ms: int | None = None
    duration_ms: int = 0
    usage: RunUsage = Field(default_factory=RunUsage)
    waiting: tuple[Waiting, ...] = ()
    last_error: ErrorDetails | None = None
    forked_from: str | None = None
    """The checkpoint of another run from which this run continues (`Client.fork`)."""
    parent_run_id: str | None = None
    """The run that has delegated to this one."""
    request: RunRequest | None = None
    result: RunResult[Any] | None = None

    @property
    def reason_code(self) -> str | None:
        """The code of the error that ended the run, or that the run is retried for; None without an error."""
        if self.result is not None:
            details = self.result.error_details
            return details.code if details is not None else None
        return self.last_error.code if self.last_error and self.state is RunState.RETRYING else None
