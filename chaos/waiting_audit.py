"""The audit of everything that waits: whether each payment, value, message and sleep is exactly as decided.

A payment that was denied was never made. One that was approved was made with the arguments of the decision. A
payment was made again only if an operator, or the system behind the tool, had said so before. Each value was
received once and in order, and no sleep ended early.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from chaos.effects import Execution
from chaos.evidence import Audit, Evidence, ReadRun
from chaos.people import DeciderAnswer, Resolved, Steered
from openagents_worker.models import RunState

__all__ = ["WaitingAudit"]

CLOCK_ERROR_S = 0.05  # a sleep is rounded to milliseconds, by the clock of Redis


@dataclass(slots=True)
class _Decisions:
    """What the events of a run say about its approvals, by the `n` of the payment."""

    asked: dict[str, str] = field(default_factory=dict)
    """The `n` of each call that was asked about, by the id of the call."""
    made: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    moments: list[float] = field(default_factory=list)
    """When they were decided, by the monotonic clock."""


class WaitingAudit:
    """Checks one run after the other, and adds what is wrong to `found`."""

    def __init__(self, evidence: Evidence, found: Audit) -> None:
        self._evidence = evidence
        self._found = found
        self._wall_s = time.time() - time.monotonic()
        self._executions: dict[str, list[Execution]] = defaultdict(list)
        for execution in evidence.executions:
            self._executions[execution.run_id].append(execution)
        self._answers: dict[str, list[DeciderAnswer]] = defaultdict(list)
        for answer in evidence.answers:
            self._answers[answer.run_id].append(answer)
        self._resolved: dict[str, list[Resolved]] = defaultdict(list)
        for resolved in evidence.resolved:
            self._resolved[resolved.run_id].append(resolved)
        self._steered: dict[str, list[Steered]] = defaultdict(list)
        for steered in evidence.steered:
            self._steered[steered.run_id].append(steered)
        self._not_found: dict[str, list[float]] = defaultdict(list)
        for not_found in evidence.not_found:
            self._not_found[not_found.key].append(not_found.at)

    def check(self, run: ReadRun) -> None:
        """Check the payments, values, sleeps and messages of this run."""
        decisions = self._check_decisions(run)
        for n in run.accepted.plan.payments:
            self._check_payment(run, n, decisions)
        self._check_repetitions(run)
        self._check_resolutions(run)
        self._check_values(run)
        self._check_sleeps(run)
        self._check_steering(run)

    def failure_codes(self, run: ReadRun) -> set[str]:
        """The error codes with which the run may have failed, because of what was decided."""
        codes = (
            {"run.outcome_unknown"} if any(r.action == "fail" for r in self._resolved[run.name]) else set()
        )
        if any(event.payload.get("action") == "fail" for event in run.events if event.name == "tool.denied"):
            codes.add("approval.timeout")
        return codes

    def was_steered(self, run_id: str) -> bool:
        return run_id in self._steered

    # --- approvals ---------------------------------------------------------------------------------------

    def _check_decisions(self, run: ReadRun) -> _Decisions:
        """Each call has at most one decision, and it is the one in every answer."""
        decisions = _Decisions()
        for event in run.events:
            match event.name, event.payload:
                case "tool.approval_needed", {"call_id": str(call_id), "params": {"n": str(n)}}:
                    decisions.asked[call_id] = n
                case "tool.approved" | "tool.denied", {"call_id": str(call_id)}:
                    decisions.made[decisions.asked[call_id]].append(event.payload)
                    decisions.moments.append(event.timestamp.timestamp() - self._wall_s)
        was_lost = any(map(self._evidence.may_be_missing, decisions.moments))
        for n, made in decisions.made.items():
            calls = {str(each["call_id"]) for each in made}
            # The model may be asked again if Redis has lost its reply: that is another call.
            if len(made) > (len(calls) if was_lost else 1):
                self._found.wrong_decisions.append(f"{run.name} {n} was decided {len(made)} times: {made}")
        for answer in self._answers[run.name]:
            made = decisions.made.get(answer.n, [])
            is_kept = any(_is_same(answer, each) for each in made)
            if not is_kept and not self._evidence.may_be_missing(answer.at):
                what = f"{answer.decision.action} by {answer.decision.by} at {answer.decision.at}"
                self._found.wrong_decisions.append(
                    f"{run.name} {answer.n}: the answer was {what}, but kept is {made}"
                )
        return decisions

    # --- payments ----------------------------------------------------------------------------------------

    def _check_payment(self, run: ReadRun, n: str, decisions: _Decisions) -> None:
        """A payment was made as it was decided, or not at all."""
        call = run.accepted.plan.payments[n]
        executions = [each for each in self._executions[run.name] if each.n == n]
        if self._decided_in_a_loss(run, n, executions):
            return
        cents: int | None = call["cents"]
        if call["tool"].startswith("refund"):
            decision = decisions.made[n][-1] if n in decisions.made else None
            if decision is None or decision.get("action", "approve") != "approve":
                cents = None
            elif decision.get("arguments"):
                cents = decision["arguments"]["cents"]
        if cents is None and executions:
            self._found.wrong_effects.append(f"{run.name} {n} was not approved, and was paid: {executions}")
        if cents is not None and any(each.cents != cents for each in executions):
            self._found.wrong_effects.append(f"{run.name} {n} must pay {cents} cents, and paid: {executions}")
        if cents is not None and not executions and run.record.state is RunState.COMPLETED:
            self._found.wrong_effects.append(f"{run.name} {n} must pay {cents} cents, and was not paid")

    def _decided_in_a_loss(self, run: ReadRun, n: str, executions: Sequence[Execution]) -> bool:
        """Whether Redis may have lost a decision after the payment was made because of it."""
        moments = [each.begun for each in executions] + [
            answer.at for answer in self._answers[run.name] if answer.n == n
        ]
        return any(map(self._evidence.may_be_missing, moments))

    def _check_repetitions(self, run: ReadRun) -> None:
        """A payment was made again only as often as somebody had said before that it is to be made."""
        by_key: dict[str, list[Execution]] = defaultdict(list)
        for execution in self._executions[run.name]:
            if execution.cents is not None:
                by_key[execution.key].append(execution)
        for key, executions in by_key.items():
            executions.sort(key=lambda each: each.begun)
            permitted = self._not_found[key] + [
                each.asked_at
                for each in self._resolved[run.name]
                if each.action == "rerun" and each.call_id == executions[0].call_id
            ]
            for again, execution in enumerate(executions[1:], start=1):
                before = sum(at < execution.begun for at in permitted)
                lost = any(self._evidence.may_be_missing(each.begun) for each in executions[:again])
                if before < again and not lost:
                    self._found.wrong_effects.append(f"{key} was paid again without permission: {executions}")
                    break

    def _check_resolutions(self, run: ReadRun) -> None:
        """A call whose result was given by an operator has this result."""
        for resolved in self._resolved[run.name]:
            if resolved.serial is None or self._evidence.may_be_missing(resolved.asked_at):
                continue
            result = run.results.get(resolved.call_id)
            if result != resolved.serial and (result is not None or run.record.state is RunState.COMPLETED):
                self._found.wrong_effects.append(
                    f"{run.name} {resolved.call_id} was resolved as {resolved.serial}, and returned {result}"
                )

    # --- values, sleeps, messages ------------------------------------------------------------------------

    def _check_values(self, run: ReadRun) -> None:
        """The values were received in the order in which they were sent, each once."""
        plan, result = run.accepted.plan, run.record.result
        if not plan.values or run.record.state is not RunState.COMPLETED or result is None:
            return
        received = run.collected
        if plan.agent_id == "mailbox":
            output: Any = result.final_output
            received = [each for each in output["received"] if each != "none"]
        may_be_sent_again = any(map(self._evidence.may_be_missing, self._evidence.sent.get(run.name, ())))
        if may_be_sent_again:  # then an earlier value may arrive after a later one
            received = sorted(received, key=str)
        if received != list(range(plan.values)):
            self._found.wrong_values.append(f"{run.name} waits for {plan.values} values, and got {received}")

    def _check_sleeps(self, run: ReadRun) -> None:
        """What comes after a sleep did not begin before the sleep was over."""
        sleep_s = run.accepted.plan.sleep_s
        if not sleep_s:
            return
        recorded = [each for each in self._executions[run.name] if each.serial in run.recorded]
        recorded.sort(key=lambda each: each.n)
        for before, after in pairwise(recorded):
            slept_s = after.begun - before.arrived
            if slept_s < sleep_s - CLOCK_ERROR_S:
                self._found.early_wakes.append(f"{run.name} slept {slept_s:.3f} s instead of {sleep_s} s")

    def _check_steering(self, run: ReadRun) -> None:
        """A message was taken once; and if the run asked the model twice afterwards, it was taken."""
        taken = [event.payload.get("text") for event in run.events if event.name == "run.steered"]
        if len(set(taken)) < len(taken):
            self._found.wrong_steering.append(f"{run.name} has taken a message twice: {taken}")
        for steered in self._steered[run.name]:
            if steered.text in taken or self._evidence.may_be_missing(steered.at):
                continue
            asked = [
                each
                for each in self._executions[run.name]
                if not each.n and each.serial in run.recorded and each.begun > steered.at
            ]
            if len(asked) > 1:
                self._found.wrong_steering.append(f"{run.name} has not taken {steered.text!r}")


def _is_same(answer: DeciderAnswer, kept: dict[str, Any]) -> bool:
    decision = answer.decision
    action = kept.get("action", decision.action)
    arguments = kept.get("arguments")
    return kept["by"] == decision.by and action == decision.action and arguments == decision.arguments
