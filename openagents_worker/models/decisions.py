"""Decisions. The only place that defines what a person is asked about a call, and what was decided."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import JsonValue

from openagents_worker.models.base import StoredModel

__all__ = ["Approval", "Decision"]


class Approval(StoredModel):
    """A call of a tool that waits for an approval.

    `arguments` are those with which the tool would be called; secrets in them are masked. At `expires_at`
    (UTC; None: never) the run continues as if `default_action` had been decided.
    """

    run_id: str
    call_id: str
    agent_id: str
    session_id: str
    tenant: str | None = None
    tool_id: str
    arguments: dict[str, JsonValue]
    reason: str | None = None
    requested_at: datetime
    expires_at: datetime | None = None
    default_action: Literal["deny", "approve", "fail"] = "deny"


class Decision(StoredModel):
    """A decision about a call: an approval that was needed, or a call whose outcome is unknown.

    `action` is `approve` or `deny` for an approval; `fail` also if it timed out. For an unknown outcome it is
    `rerun`, `skip` (`result` is the result of the call), `fail`, or `outcome`: the worker that made the call
    reported what it returned. `by` names who decided, `at` is the time (UTC). `arguments` are those that
    replace the ones of the model; None: the call is made as it was asked.
    """

    call_id: str
    action: Literal["approve", "deny", "fail", "rerun", "skip", "outcome"]
    by: str
    at: datetime
    note: str | None = None
    arguments: dict[str, JsonValue] | None = None
    result: JsonValue = None
