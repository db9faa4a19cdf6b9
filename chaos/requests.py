"""The requests of a chaos run: the only place that decides what its runs do. All is drawn from one seed."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Plan", "payments_of", "plan", "simple_plan"]

STEP_MS = (0, 10, 50, 400)
PAYMENT_MS = (0, 50, 400, 1500)  # long ones too, so that workers die meanwhile
PAYMENTS = ("pay", "settle", "refund", "refund_or_deny", "refund_or_pay", "refund_or_fail")
"""Tools whose calls must not be repeated without permission; those that refund wait for an approval."""
WEIGHTS = (3, 3, 5, 3, 3, 1)
SLEEP_S = 1.2
"""A run parks for a sleep that is longer than a second."""

OnBusy = Literal["enqueue", "interrupt", "rollback"]
Call = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run does. `values` is how many values are sent to it."""

    agent_id: str
    input_text: str
    values: int = 0
    on_busy: OnBusy = "enqueue"
    payments: Mapping[str, Call] = field(default_factory=dict)
    """The arguments of its payments as the model gives them, by their `n`."""
    sleep_s: float = 0.0
    """How long the pattern sleeps before it receives a value."""


def plan(chance: random.Random, *, is_first: bool) -> Plan:
    """The plan of the next run. `is_first`: no other run of its session was submitted before."""
    kind = chance.choices(("steps", "branches", "counter", "mailbox"), (50, 12, 25, 13))[0]
    on_busy: OnBusy = "enqueue"
    if not is_first:
        on_busy = chance.choices(("enqueue", "interrupt", "rollback"), (85, 10, 5))[0]
    match kind:
        case "counter":
            return _counter(chance, on_busy)
        case "mailbox":
            return _mailbox(chance, on_busy)
        case _:
            return simple_plan(chance, kind, on_busy)


def simple_plan(chance: random.Random, kind: str = "steps", on_busy: OnBusy = "enqueue") -> Plan:
    """A run that waits for nobody: a chain of calls, or parallel branches."""
    if kind == "branches":
        return Plan("branches", "go", on_busy=on_busy)
    limits = chance.choice((1, 2)) if chance.random() < 0.1 else 0
    turns = [
        [{"tool": "charge", "n": f"s{n}", "ms": chance.choice(STEP_MS), "limits": limits}]
        for n in range(chance.randrange(1, 6))
    ]
    return Plan("clerk", _script(turns), on_busy=on_busy)


def payments_of(turns: Sequence[Sequence[Call]]) -> dict[str, Call]:
    """The payments in the turns of a model, by their `n`."""
    return {call["n"]: call for turn in turns for call in turn if call["tool"] in PAYMENTS}


def _counter(chance: random.Random, on_busy: OnBusy) -> Plan:
    """A run of several turns, most of them with one or two payments; some wait for a value."""
    turns: list[list[Call]] = []
    values = 0
    for turn in range(chance.randrange(1, 4)):
        if chance.random() < 0.2:
            turns.append([{"tool": "collect", "n": f"t{turn}"}])
            values += 1
            continue
        tools = chance.choices(PAYMENTS, WEIGHTS, k=chance.choice((1, 1, 2)))
        turns.append([_payment(chance, tool, f"t{turn}.{at}") for at, tool in enumerate(tools)])
    return Plan("counter", _script(turns), values, on_busy, payments_of(turns))


def _payment(chance: random.Random, tool: str, n: str) -> Call:
    return {"tool": tool, "n": n, "cents": chance.randrange(1, 900), "ms": chance.choice(PAYMENT_MS)}


def _mailbox(chance: random.Random, on_busy: OnBusy) -> Plan:
    """A run whose pattern receives values, and sleeps before each of them or waits in vain at the end."""
    values = chance.randrange(1, 4)
    sleep_s = SLEEP_S if chance.random() < 0.3 else 0.0
    script = {"values": values, "sleep_s": sleep_s, "in_vain": chance.random() < 0.3}
    return Plan("mailbox", json.dumps(script), values, on_busy, sleep_s=sleep_s)


def _script(turns: Sequence[Sequence[Call]]) -> str:
    """The text that tells the model server what to answer."""
    return json.dumps({"turns": turns})
