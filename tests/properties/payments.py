"""Payments: the only place that plays calls with effects, their approvals, and the decisions about both.

A payment has its effect when the worker knows that its intent is stored. It must not happen again before its
outcome is recorded, unless somebody has decided that it may.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openagents_worker.store import scripts
from openagents_worker.store.scripts import ScriptCall

if TYPE_CHECKING:
    from tests.properties.truth import Run, Truth

__all__ = ["CALL", "FACTS_OF_CALL", "RESOLUTION", "Payments", "ask_call", "decide_call", "intent_call"]

CALL = "pay:aa:1"
INTENT, FENCE, RESOLUTION = f"intent:{CALL}", f"fence:{CALL}", f"resolution:{CALL}"
FACTS_OF_CALL = (INTENT, FENCE, RESOLUTION)
ASKED, APPROVED = "ask:z", "approval:z"
ENDING_WITH_LIFE = (RESOLUTION, ASKED)


@dataclass
class Payments:
    """The effects of each run, counted from outside, and how many may have happened by now."""

    effects: dict[tuple[str, int], int] = field(default_factory=dict)
    allowed: dict[tuple[str, int], int] = field(default_factory=dict)

    def happens(self, run: Run, lost_a_second: bool) -> None:
        key = run.id, run.born
        self.effects[key] = self.effects.get(key, 0) + 1
        if not lost_a_second:
            assert self.effects[key] <= self.allowed.get(key, 1), f"{run.id} has paid twice"

    def is_recorded(self, run: Run) -> None:
        """The next payment is another one."""
        key = run.id, run.born
        self.allowed[key] = self.effects.get(key, 0) + 1

    def may_happen_again(self, run: Run) -> None:
        key = run.id, run.born
        self.allowed[key] = self.allowed.get(key, 1) + 1


def intent_call(ids: dict[str, str], number: int, knows: bool, batch_no: int, stored: int) -> ScriptCall[Any]:
    return scripts.intent(
        **ids,
        call=CALL,
        value=str(number),
        knows_decision=knows,
        batch_no=batch_no,
        events=["told", json.dumps({"number": number})],
        stored=stored,
    )


def ask_call(ids: dict[str, str], number: int, batch_no: int, stored: int) -> ScriptCall[Any]:
    events = ["told", json.dumps({"number": number})]
    return scripts.ask(**ids, call="z", value=str(number), batch_no=batch_no, events=events, stored=stored)


def decide_call(run_id: str, kind: str, value: str, fence: str = "") -> ScriptCall[Any]:
    return scripts.decide(
        run_id=run_id,
        kind=kind,
        call=CALL if kind == "resolution" else "z",
        value=value,
        event="tool.outcome_resolved",
        payload="{}",
        fence=fence,
    )


class PaymentsTruth:
    """The part of the model that knows intents, questions and decisions."""

    def intent(
        self: Truth, run_id: str, fence: str, value: str, knows: bool, batch_no: int, number: int, stored: int
    ) -> tuple[str, str]:
        """The answer, and the decision that the worker did not know."""
        run = self.writer(run_id, fence)
        if not run:
            return "FENCED", ""
        if stored > len(run.journal):
            return "MISPLACED", ""
        decision = "" if knows else run.facts.get(RESOLUTION, "")
        if batch_no <= run.emit_no:
            return "SAME", decision
        run.emit_no = batch_no
        run.told.append(number)
        if not decision:
            run.facts.pop(RESOLUTION, None)
            run.facts |= {INTENT: value, FENCE: fence}
        return "OK", decision

    def ask(self: Truth, run_id: str, fence: str, value: str, batch_no: int, number: int, stored: int) -> str:
        run = self.writer(run_id, fence)
        if not run:
            return "FENCED"
        if stored > len(run.journal):
            return "MISPLACED"
        if batch_no <= run.emit_no:
            return "SAME"
        run.emit_no = batch_no
        run.told.append(number)
        run.facts.setdefault(ASKED, value)
        return "OK"

    def decide(self: Truth, run_id: str, kind: str, value: str, fence: str = "") -> tuple[str, set[str]]:
        run = self.runs.get(run_id)
        name = RESOLUTION if kind == "resolution" else APPROVED
        if not run:
            return "UNKNOWN", set()
        if name in run.facts:
            return "ALREADY", set()
        if run.over:
            return "GONE", set()
        if not (ASKED in run.facts if kind == "approval" else _is_in_question(run, fence)):
            return "NOT_PENDING", set()
        return self.fact(run_id, name, value, "")


def _is_in_question(run: Run, fence: str) -> bool:
    begun_by = run.facts.get(FENCE)
    is_being_made = run.state == "running" and run.fence == begun_by and not fence
    return begun_by is not None and fence in ("", begun_by) and not is_being_made


def waits_for_approval(run: Run) -> bool:
    return not run.over and ASKED in run.facts and APPROVED not in run.facts
