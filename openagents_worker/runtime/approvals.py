"""Approvals: the only place where an attempt asks for the approval of a call, and reads what was decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from openagents_worker.jsontext import dumps, loads
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import Decision
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.facts import Fact, FactKind, Facts
from openagents_worker.store.formats import WRITTEN, translate_parse_errors

__all__ = ["TIMEOUT", "Approvals", "Asked"]

TIMEOUT = "timeout"
"""Who decides if nobody has decided in time."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked about a call. Times are ms since 1970 by the clock of Redis; 0: it does not expire."""

    tool_id: str
    arguments: Any
    reason: str | None
    requested_ms: int
    expires_ms: int
    default_action: str

    @classmethod
    def of(cls, fact: Fact, run_id: str) -> Self:
        """Parse what was stored. Raises `RecordUnreadable`."""
        with translate_parse_errors(WRITTEN, run_id=run_id):
            value = loads(fact.text)
            return cls(
                str(value["tool_id"]),
                value["arguments"],
                value.get("reason"),
                int(value["requested_ms"]),
                int(value.get("expires_ms", 0)),
                str(value["default_action"]),
            )

    def to_json(self) -> str:
        fields = {
            "tool_id": self.tool_id,
            "arguments": self.arguments,
            "reason": self.reason,
            "requested_ms": self.requested_ms,
            "expires_ms": self.expires_ms,
            "default_action": self.default_action,
        }
        return dumps({name: value for name, value in fields.items() if value not in (None, 0)})


class Approvals:
    """The approvals that the calls of one attempt wait for."""

    def __init__(self, facts: Facts, writer: RunWriter) -> None:
        self._asked = {fact.id: Asked.of(fact, writer.run_id) for fact in facts.of(FactKind.ASK)}
        self._writer = writer

    def asked(self, call_id: str) -> Asked | None:
        """What an earlier attempt has asked about the call; None if it has not."""
        return self._asked.get(call_id)

    async def ask(self, info: CallInfo, asked: Asked) -> None:
        """Ask about a call, with the event `tool.approval_needed`."""
        expires_at = _iso(asked.expires_ms)
        payload = {
            "tool_id": asked.tool_id,
            "call_id": info.call_id,
            "params": self._writer.preview(asked.arguments),
            "reason": asked.reason,
            "expires_at": expires_at,
            "default_action": asked.default_action,
        }
        self._writer.emit("tool.approval_needed", payload)
        await self._writer.ask(info.call_id, asked.to_json())
        self._asked[info.call_id] = asked

    async def decide_by_timeout(self, info: CallInfo, asked: Asked) -> Decision:
        """Nobody has decided in time: the default does, unless somebody decides at this moment."""
        decision = {
            "call_id": info.call_id,
            "action": asked.default_action,
            "by": TIMEOUT,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        first = await self._writer.decide_approval(info.call_id, event_of(decision), decision)
        return decision_of(first or dumps(decision), info.call_id, self._writer.run_id)


def decision_of(text: str, call_id: str, run_id: str) -> Decision:
    """Parse a stored decision. Raises `RecordUnreadable`."""
    with translate_parse_errors(WRITTEN, run_id=run_id):
        return Decision.model_validate({"call_id": call_id, **loads(text)})


def event_of(decision: Mapping[str, Any]) -> str:
    """The name of the event about a decision."""
    return "tool.approved" if decision["action"] == "approve" else "tool.denied"


def _iso(at_ms: int) -> str | None:
    if not at_ms:
        return None
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")
