"""People and systems outside: the only place that decides, resolves, sends and steers during a chaos run.

They use the public client, from their own threads, at random moments: around faults, around time-outs, and
against each other. Each keeps the answers that it got; the audit compares that with what has happened.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from chaos.effects import Execution
from chaos.load import Accepted, Load, Repeating
from openagents_worker import Client
from openagents_worker.errors import ApprovalNotPending, OpenAgentsError, RunConflict, RunNotFound
from openagents_worker.models import Approval, Decision, RunState, WaitKind

__all__ = ["EDITED_CENTS", "People", "DeciderAnswer"]

DECIDERS = 2
LOOK_S = 0.4  # mean time between two looks of a decider at what waits
DECIDE_CHANCE = 0.5
EDITED_CENTS = 1000
"""A decider that edits the arguments of a payment adds this to its cents."""
WISHES = ("approve", "edit", "deny", "nothing")
WISH_WEIGHTS = (4, 3, 2, 2)
SEND_WITHIN_S = 1.5  # between two values of a run
TWICE_CHANCE = 0.3
SEND_AGAIN_S = 10.0  # after this time a sender looks whether Redis has lost what it has sent
FAIL_CHANCE = 0.05


@dataclass(frozen=True, slots=True)
class DeciderAnswer:
    """The answer to a decision: it counts, or this other one was the first."""

    run_id: str
    n: str
    """The payment."""
    decision: Decision
    is_mine: bool
    at: float
    """When the answer arrived, by the monotonic clock."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """An operator has decided what becomes of a payment whose outcome is unknown."""

    run_id: str
    call_id: str
    action: str
    serial: int | None
    """The execution that was given as the result."""
    asked_at: float
    """Just before the operator decided, by the monotonic clock."""


@dataclass(frozen=True, slots=True)
class Steered:
    run_id: str
    text: str
    at: float
    """When the answer arrived, by the monotonic clock."""


class Outside(Protocol):
    """What an operator sees of the system behind the tools."""

    executions: list[Execution]


@dataclass(slots=True)
class People:
    """Deciders, an operator, a sender and somebody who steers, from `start` until `stop`."""

    client: Client
    load: Load
    outside: Outside
    may_be_lost: Callable[[float], bool]
    """Whether Redis may have lost what it has accepted at this moment."""
    seed: int
    repeating: Repeating = field(default_factory=Repeating)
    answers: list[DeciderAnswer] = field(default_factory=list)
    resolved: list[Resolved] = field(default_factory=list)
    sent: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """When each value of a run was accepted."""
    steered: list[Steered] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        targets: list[Callable[[], None]] = [partial(self._decide, number) for number in range(DECIDERS)]
        for target in [*targets, self._operate, self._send, self._steer]:
            self._threads.append(threading.Thread(target=self._guarded, args=(target,), name="people"))
            self._threads[-1].start()

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self.repeating.problems.append(f"the harness has a bug: {error!r}")
            raise

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _protected(self, what: str, act: Callable[[], None]) -> None:
        """Do it. A run that does not exist was lost; the audit finds that. Any other error is a problem."""
        try:
            act()
        except RunNotFound:
            pass
        except OpenAgentsError as error:
            self.repeating.problems.append(f"{what}: {error.code}: {error}")

    # --- approvals ---------------------------------------------------------------------------------------

    def _decide(self, number: int) -> None:
        """Look at what waits, again and again, and decide about some of it."""
        chance = random.Random(f"{self.seed} decider {number}")
        while not self._over.wait(chance.expovariate(1 / LOOK_S)):
            for approval in self._pending():
                if chance.random() < DECIDE_CHANCE:
                    what = f"decide about {approval.run_id} {approval.call_id}"
                    self._protected(what, partial(self._decide_one, approval, number))

    def _pending(self) -> Sequence[Approval]:
        return list(self.repeating.until_answered(partial(self.client.approvals, limit=1000)))

    def _decide_one(self, approval: Approval, number: int) -> None:
        n, cents = str(approval.arguments["n"]), int(str(approval.arguments["cents"]))
        wishing = random.Random(f"{self.seed} {approval.run_id} {n} {number}")
        wish = wishing.choices(WISHES, WISH_WEIGHTS)[0]
        if wish == "nothing" and approval.expires_at is not None:
            return
        ids, by = (approval.run_id, approval.call_id), f"decider-{number}"
        edited = {**approval.arguments, "cents": cents + EDITED_CENTS} if wish == "edit" else None
        try:
            decision = self.repeating.until_answered(
                lambda: (
                    self.client.deny(*ids, by=by, note="no")
                    if wish == "deny"
                    else self.client.approve(*ids, by=by, arguments=edited)
                )
            )
        except ApprovalNotPending as error:
            if error.decision is not None:
                self.answers.append(
                    DeciderAnswer(approval.run_id, n, error.decision, False, time.monotonic())
                )
        else:
            self.answers.append(DeciderAnswer(approval.run_id, n, decision, True, time.monotonic()))

    # --- unknown outcomes --------------------------------------------------------------------------------

    def _operate(self) -> None:
        """Look at the runs that wait because an outcome is unknown, and at the system behind the tool."""
        chance = random.Random(f"{self.seed} operator")
        while not self._over.wait(chance.expovariate(1 / LOOK_S)):
            paused = self.repeating.until_answered(
                partial(self.client.runs, state=RunState.PAUSED, limit=200)
            )
            for record in paused:
                for waiting in record.waiting:
                    if waiting.kind is WaitKind.OUTCOME:
                        what = f"resolve {record.run_id} {waiting.call_id}"
                        act = partial(self._resolve, record.run_id, waiting.call_id, chance.random())
                        self._protected(what, act)

    def _resolve(self, run_id: str, call_id: str, drawn: float) -> None:
        asked_at = time.monotonic()
        made = [
            each
            for each in list(self.outside.executions)
            if each.run_id == run_id and each.call_id == call_id
        ]
        serial = made[-1].serial if made else None
        action = "fail" if drawn < FAIL_CHANCE else "skip" if made else "rerun"
        result = {"serial": serial, "cents": made[-1].cents} if action == "skip" else None
        by = f"operator {asked_at}"
        try:
            decision = self.repeating.until_answered(
                partial(self.client.resolve, run_id, call_id, action, by=by, result=result)  # type: ignore[arg-type] # one of the three
            )
        except ApprovalNotPending as error:
            if error.decision is None or error.decision.by != by:
                return  # the worker that made the call has reported its outcome, or the run has ended
            decision = error.decision
        given = serial if action == "skip" else None
        self.resolved.append(Resolved(run_id, call_id, decision.action, given, asked_at))

    # --- values ------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """Send each run its values in order, some of them twice, before and after it asks for them."""
        chance = random.Random(f"{self.seed} sender")
        due: list[tuple[float, str, int]] = []
        seen = 0
        while not self._over.wait(0.02):
            runs = self.load.accepted
            for run in runs[seen:]:
                seen += 1
                if run.plan.values:
                    heapq.heappush(due, (run.at + chance.uniform(0, SEND_WITHIN_S), run.run_id, 0))
            while due and due[0][0] <= time.monotonic() and not self._over.is_set():
                _, run_id, number = heapq.heappop(due)
                run = next(each for each in reversed(runs) if each.run_id == run_id)
                after_s = self._send_due(run, number, chance)
                if after_s is not None:
                    heapq.heappush(due, (time.monotonic() + after_s, run_id, number + 1))

    def _send_due(self, run: Accepted, number: int, chance: random.Random) -> float | None:
        """Send one value, or look after the last one; returns after how many seconds to go on."""
        if number < run.plan.values:
            for at in [number, *([chance.randrange(number + 1)] if chance.random() < TWICE_CHANCE else [])]:
                self._send_value(run.run_id, at)
            is_last = number + 1 == run.plan.values
            return SEND_AGAIN_S if is_last else chance.uniform(0, SEND_WITHIN_S)
        if run.run_id not in self.load.open_runs():
            return None
        if any(map(self.may_be_lost, [run.at, *self.sent[run.run_id]])):
            for at in range(run.plan.values):  # Redis has lost the last ones, so all of them in order
                self._send_value(run.run_id, at)
        return SEND_AGAIN_S

    def _send_value(self, run_id: str, number: int) -> None:
        def act() -> None:
            try:
                self.repeating.until_answered(
                    partial(self.client.send, run_id, "mail", number, message_id=f"{run_id}-{number}")
                )
            except RunConflict:
                return  # the run is over
            self.sent[run_id].append(time.monotonic())

        self._protected(f"send {run_id} {number}", act)

    # --- steering ----------------------------------------------------------------------------------------

    def _steer(self) -> None:
        """Put a message into one of the newest runs, about once in two seconds."""
        chance = random.Random(f"{self.seed} steering")
        number = 0
        while not self._over.wait(chance.expovariate(0.5)):
            runs = [run for run in self.load.accepted[-15:] if run.plan.agent_id in ("clerk", "counter")]
            if not runs or (run := chance.choice(runs)).run_id not in self.load.open_runs():
                continue
            number += 1
            self._protected(f"steer {run.run_id}", partial(self._steer_one, run.run_id, f"note-{number}"))

    def _steer_one(self, run_id: str, text: str) -> None:
        try:
            self.repeating.until_answered(partial(self.client.steer, run_id, text, message_id=text))
        except RunConflict:
            return  # the run is over
        self.steered.append(Steered(run_id, text, time.monotonic()))
