"""Child budgets: the only place that decides how much of the budget of a run its children may use.

What a child may use is reserved before it begins, and settled when its result is recorded: its usage is then
a part of the usage of the run. So children that work side by side, and the model calls of the run beside
them, cannot use the same budget twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from openagents_worker.errors import BudgetExhausted
from openagents_worker.models import RunBudget, RunUsage
from openagents_worker.runtime.working_budget import WorkingBudget

__all__ = ["SHARED_LIMITS", "Grant", "PendingChild", "Shortage", "Siblings", "grant_of"]

SHARED_LIMITS = ("max_cost_usd", "max_total_tokens", "max_tool_calls")
"""The limits of a run that also hold for its children, with what they have used."""
_KINDS = {"max_cost_usd": "cost", "max_total_tokens": "tokens", "max_tool_calls": "tool_calls"}


@dataclass(slots=True)
class PendingChild:
    """A child whose result is not recorded yet. `reserved` maps the names of limits to numbers."""

    run_id: str
    life: int
    reserved: Mapping[str, float] = field(default_factory=dict)
    settles: bool = True
    """Whether a call of this run waits for it. One in the background keeps its part of the budget."""

    @classmethod
    def of(cls, value: Any) -> PendingChild | None:
        """From the value of a fact; None if it is not such a value."""
        if not isinstance(value, dict) or not isinstance(value.get("run_id"), str):
            return None
        life, reserved = value.get("life"), value.get("reserved")
        numbers = reserved.items() if isinstance(reserved, dict) else ()
        return cls(
            value["run_id"],
            life if isinstance(life, int) else 0,
            {name: number for name, number in numbers if isinstance(number, int | float)},
        )

    def asked_again(self) -> PendingChild:
        """The same child, for a call that is made again: the script that creates children finds it."""
        return replace(self, life=0)


@dataclass(slots=True)
class Siblings:
    """Children of one `delegate_many`. They share evenly what is left of the budget of their parent.

    `at_once` is how many of them work side by side.
    """

    at_once: int
    working: set[str] = field(default_factory=set)
    """The calls that have got their share."""

    @property
    def shares(self) -> int:
        """How many of them have not got their share yet."""
        return max(1, self.at_once - len(self.working))


@dataclass(frozen=True, slots=True)
class Grant:
    """The budget of a child, and what of it is reserved in that of its parent."""

    budget: RunBudget | None
    reserved: Mapping[str, float]

    @classmethod
    def of(cls, asked: RunBudget | None, reserved: Mapping[str, float]) -> Grant:
        """The budget that was asked for, with the limits that are reserved."""
        limits = {name: reserved[name] for name in SHARED_LIMITS if name in reserved}
        return cls((asked or RunBudget()).model_copy(update=limits) if limits else asked, reserved)


@dataclass(frozen=True, slots=True)
class Shortage:
    """Nothing is left of a limit of the parent. `is_reserved`: a child will settle something; `in_calls`: a
    model call of the parent will."""

    name: str
    current: float
    limit: float
    is_reserved: bool
    in_calls: bool = False

    def error(self) -> BudgetExhausted:
        return BudgetExhausted(
            f"nothing is left of {self.name} for a child run: {self.current:g} of {self.limit:g} is used or "
            "reserved",
            kind=_KINDS.get(self.name, self.name),
            current=self.current,
            limit=self.limit,
        )


def grant_of(
    asked: RunBudget | None,
    limits: WorkingBudget,
    usage: RunUsage,
    pending: Iterable[PendingChild],
    *,
    in_calls: Mapping[str, float],
    shares: int = 1,
) -> Grant | Shortage:
    """What a child may use now: at most what it asks for, and what is left of the budget of its parent.

    `in_calls` maps the names of limits to what calls in progress of the parent have reserved: its model
    calls, and each tool call itself. A child that does not ask for anything gets one of `shares` equal parts.
    """
    reserved: dict[str, float] = {}
    children = list(pending)
    for name in SHARED_LIMITS:
        limit = limits.limit(name)
        if limit is None:
            continue
        held = [child for child in children if child.reserved.get(name)]
        in_progress = in_calls.get(name, 0)
        current = _used(usage, name) + in_progress + sum(child.reserved[name] for child in held)
        own = getattr(asked, name) if asked is not None else None
        part = limit - current
        if own is None:
            part = part / shares
        if name != "max_cost_usd":
            part = math.floor(part) if part >= 1 else min(1, math.floor(limit - current))
        part = part if own is None else min(own, part)
        if part <= 0 and own != 0:
            is_reserved, ends = any(child.settles for child in held), name != "max_tool_calls"
            # The tool call that delegates does not end before its child, which may need no tools.
            if ends or is_reserved or current - in_progress >= limit:
                return Shortage(name, current, limit, is_reserved, in_calls=ends and in_progress > 0)
        reserved[name] = max(0, part)
    return Grant.of(asked, reserved)


def _used(usage: RunUsage, name: str) -> float:
    match name:
        case "max_cost_usd":
            return usage.cost_usd or 0.0
        case "max_total_tokens":
            return usage.total_tokens
    return usage.tool_calls
