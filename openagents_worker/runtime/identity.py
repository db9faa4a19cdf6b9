"""The identity of an attempt: which run it executes, and under which claim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openagents_worker.models import RunRequest
from openagents_worker.quick_init import quick_init
from openagents_worker.store.scripts import Claimed

__all__ = ["RunIdentity"]


@quick_init
@dataclass(frozen=True, slots=True)
class RunIdentity:
    """The ids of a run and of one attempt at it.

    `uid` distinguishes the run from others that had its id before. `fence` allows the attempt to write.
    """

    run_id: str
    session_id: str
    agent_id: str
    uid: str
    fence: str
    attempt: int
    life: int
    incarnation: str
    tenant: str | None = None

    @classmethod
    def of(cls, claimed: Claimed, request: RunRequest, incarnation: str) -> RunIdentity:
        return cls(
            request.run_id,
            request.session_id,
            request.agent_id,
            claimed.uid,
            claimed.fence,
            claimed.attempt,
            claimed.life,
            incarnation,
            request.tenant,
        )

    @property
    def ids(self) -> dict[str, Any]:
        """The ids as fields of events and log lines."""
        return {"agent_id": self.agent_id, "session_id": self.session_id, "run_id": self.run_id}
