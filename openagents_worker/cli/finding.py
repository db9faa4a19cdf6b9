"""Findings: the only place that defines what a check of `doctor` yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from openagents_worker.store.client import Store

__all__ = ["Finding", "FindingKind"]


class FindingKind(StrEnum):
    """OK: nothing to do. NOTE: it works, but look at it. PROBLEM: runs get lost, wait, fail or leak."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found, and what to do. `fix` does it at this Redis, if that is possible.

    `agent_id` is the agent of the agents file that it is about, if that is known.
    """

    kind: FindingKind
    subject: str
    text: str
    todo: str | None = None
    fix: Callable[[Store], object] | None = None
    agent_id: str | None = None

    def to_json(self) -> dict[str, str | bool | None]:
        return {
            "kind": str(self.kind),
            "subject": self.subject,
            "text": self.text,
            "todo": self.todo,
            "can_fix": self.fix is not None,
        }
