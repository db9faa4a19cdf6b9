"""Child requests. The only place that defines what a run may ask of another agent."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from openagents_worker.models.base import RequestModel
from openagents_worker.models.budget import RunBudget
from openagents_worker.models.fields import Id, LabelName
from openagents_worker.models.request import MAX_LABELS

__all__ = ["ChildRequest", "SessionIsolation"]

SessionIsolation = Literal["isolated", "shared", "forked"]


class ChildRequest(RequestModel):
    """One item of `RunContext.delegate_many`: the parameters of `RunContext.delegate`.

    `session_isolation`: `isolated` gives the child a new session, `forked` a copy of the session, `shared`
    the session itself. None: the default of the agents file. `deps` None: those of the parent. `labels` are
    added to those of the parent. `background`: the parent does not wait for the child.

    >>> ChildRequest(agent_id="researcher", input_text="Who invented the telephone?").agent_id
    'researcher'
    """

    agent_id: Id
    input_text: str
    session_isolation: SessionIsolation | None = None
    budget: RunBudget | None = None
    deps: Id | None = None
    labels: dict[LabelName, Id] = Field(default_factory=dict, max_length=MAX_LABELS)
    background: bool = False
