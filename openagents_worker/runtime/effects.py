"""Effects: the only place that knows which calls may have had an effect without a recorded outcome.

Before a call that must not be repeated (`durable_idempotent = False`), the attempt stores an intent: a fact
that the record of the call replaces. If an attempt has to make a call that has an intent, an earlier attempt
was interrupted while it made the call, and the effect may have happened. A resolution says what to do then:
it comes from a person, or from the worker that made the call and learned its outcome too late to record it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self

from openagents_worker.errors import RecordUnreadable
from openagents_worker.jsontext import canonical_json, dumps, loads
from openagents_worker.llm.base import CallInfo
from openagents_worker.quick_init import quick_init
from openagents_worker.runtime.call_outcome import NewRecords
from openagents_worker.runtime.journal import Record, digest_of
from openagents_worker.runtime.latch import RunLatched
from openagents_worker.runtime.rules import CallQuery, OpenCall
from openagents_worker.runtime.writer import RunWriter, facts_of_intent
from openagents_worker.store import scripts
from openagents_worker.store.facts import Fact, FactKind, Facts

__all__ = ["LATE_OUTCOME", "Effect", "Effects", "InterruptedCalls", "Resolution", "ResolutionAction"]

LATE_OUTCOME = "late_outcome"
"""Who decides if a worker reports the outcome of its call after it lost the run."""


class ResolutionAction(StrEnum):
    """What to do with an interrupted call: make it again, take a given result, fail the run, or take the
    recorded outcome of the worker that made it."""

    RERUN = "rerun"
    SKIP = "skip"
    FAIL = "fail"
    OUTCOME = "outcome"


@dataclass(frozen=True, slots=True)
class Resolution:
    """A decision about an interrupted call. `record` is set for `outcome`, `result` for `skip`."""

    action: ResolutionAction
    by: str
    note: str | None = None
    result: Any = None
    record: Record | None = None

    @classmethod
    def of(cls, value: Any) -> Self:
        """Parse the value of a fact. Raises `RecordUnreadable`."""
        try:
            record = value.get("record")
            return cls(
                ResolutionAction(value["action"]),
                str(value["by"]),
                value.get("note"),
                value.get("result"),
                Record.from_json(dumps(record)) if record is not None else None,
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise RecordUnreadable(
                f"the resolution of a call cannot be read: {type(error).__name__}",
                hint="another program may have written it",
            ) from error


@quick_init
@dataclass(frozen=True, slots=True)
class InterruptedCalls:
    """What earlier attempts have left of calls with effects, by call id."""

    begun: Mapping[str, Record] = field(default_factory=dict)
    """The intents: records without an outcome."""
    resolutions: Mapping[str, Resolution] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Facts) -> Self:
        """Raises `RecordUnreadable`, or `OtherFormat` for an intent in a format of a newer version."""
        begun = {fact.id: Record.from_json(fact.text) for fact in facts.of(FactKind.INTENT)}
        if not begun:
            return cls()
        return cls(begun, {fact.id: Resolution.of(fact.value()) for fact in facts.of(FactKind.RESOLUTION)})

    def open_calls(self) -> Iterator[OpenCall]:
        """The calls that were begun, with the unfinished calls around them."""
        for intent in self.begun.values():
            scope = ""
            for outer in intent.outer:
                yield OpenCall(outer.id, outer.kind, outer.node, scope)
                scope = outer.id
            yield OpenCall(intent.call, intent.kind, intent.node, scope, has_intent=True)


class Effects:
    """The calls with effects of one attempt."""

    def __init__(self, interrupted: InterruptedCalls, records: NewRecords, writer: RunWriter) -> None:
        self._interrupted = interrupted
        self._records = records
        self._writer = writer
        self._stored: dict[str, list[str]] = {}
        """The names of the facts of each intent, by the id of the call whose record replaces them."""
        self._others: dict[str, list[str]] = {}
        """The names of other facts of a call that its record replaces."""
        self._not_begun: set[str] = set()
        """Calls that were cancelled while their first intent was being written."""

    def of(self, query: CallQuery, call_id: str, begun_as: str) -> Effect:
        """A call that is made now. `begun_as` is the id under which an earlier attempt began it."""
        begun = self._interrupted.begun.get(begun_as)
        effect = Effect(query, begun, self._interrupted.resolutions.get(begun_as), self)
        if begun is not None:
            self._stored[call_id] = facts_of_intent(begun_as)
        return effect

    def replaces(self, call_id: str, fact_name: str) -> None:
        """The record of this call will replace this fact."""
        self._others.setdefault(call_id, []).append(fact_name)

    def taken_by(self, record: Record) -> Sequence[str]:
        """The names of the facts that a record replaces.

        A cancelled call keeps its intent if it was begun, because a later attempt may have to make it. So
        does a call whose outcome stays unknown.
        """
        others = self._others.pop(record.call, ()) if self._others else ()
        for name in others:
            self._writer.facts_at_suspend.pop(name, None)
        names = self._stored.pop(record.call, None)
        if names is None:
            return others
        self._writer.closed_at_suspend.difference_update(names)
        for name in names:
            self._writer.facts_at_suspend.pop(name, None)
        may_be_made = record.is_cancelled and record.call not in self._not_begun
        return others if may_be_made or _is_unknown(record) else [*others, *names]

    async def write_intent(
        self, effect: Effect, info: CallInfo, params: Mapping[str, Any]
    ) -> Resolution | None:
        """Store the intent of a call with these arguments.

        Returns the decision about an earlier intent, if it is new: then this one is not stored.
        """
        at = _now()
        digest = digest_of(canonical_json(params))
        begun = {"key": info.idempotency_key, "arguments": digest, "at": at}
        intent = self._records.new(effect.query, info, {"begun": begun})
        own = facts_of_intent(info.call_id)
        taken = [name for name in self._stored.get(info.call_id, ()) if name not in own]
        known = effect.resolution is not None
        try:
            decision = await self._writer.write_intent(info.call_id, intent.to_json(), known, taken)
        except asyncio.CancelledError:  # the intent is stored, but the call is not made
            if effect.interrupted is None:
                self._not_begun.add(info.call_id)
                self._stored[info.call_id] = own
                self._writer.closed_at_suspend.update(own)
            raise
        if decision:
            return Resolution.of(loads(decision))
        self._stored[info.call_id] = own
        self._writer.close_intent_at_suspend(info.call_id)
        return None

    def keep(self, call_id: str) -> None:
        """The intent of a call stays when the run is suspended."""
        self._writer.keep_intent(call_id)

    def not_executed(self, info: CallInfo) -> None:
        """A call was certainly not executed: when the run is suspended, that is stored as a decision. It is
        reported if this worker has lost the run."""
        decision = {"action": ResolutionAction.RERUN, "by": LATE_OUTCOME, "at": _now()}
        fact = Fact(FactKind.RESOLUTION, info.call_id, dumps(decision))
        self._writer.facts_at_suspend[fact.name] = fact
        if self._writer.is_fenced:
            self.report(info.call_id, info.name, {"action": ResolutionAction.RERUN})

    def report(self, call_id: str, tool_id: str, resolution: Mapping[str, Any]) -> None:
        """Tell the next owner of the run what this attempt knows about its call, in the background."""
        by = {"by": LATE_OUTCOME, "at": _now()}
        payload = {"call_id": call_id, "tool_id": tool_id, "action": resolution["action"], "by": LATE_OUTCOME}
        self._writer.report(
            scripts.decide(
                run_id=self._writer.run_id,
                kind=scripts.DecisionKind.RESOLUTION,
                call=call_id,
                value=dumps({**resolution, **by}),
                event="tool.outcome_resolved",
                payload=dumps(payload),
                fence=self._writer.fence,
            ),
            call_id,
        )


class Effect:
    """One call with effects: what earlier attempts have left of it, and its intent."""

    def __init__(
        self, query: CallQuery, interrupted: Record | None, resolution: Resolution | None, effects: Effects
    ) -> None:
        self.query = query
        self.interrupted = interrupted
        """The intent of an earlier attempt; None if the call was not begun."""
        self.resolution = resolution
        self._effects = effects
        self._is_written = False

    @property
    def idempotency_key(self) -> str | None:
        """The key with which an earlier attempt made the call."""
        begun = self.interrupted.outcome.get("begun") if self.interrupted is not None else None
        key = begun.get("key") if isinstance(begun, dict) else None
        return key if isinstance(key, str) else None

    @property
    def began_in_life(self) -> int:
        """The number of the life in which an earlier attempt began the call; 0 if none has."""
        return self.interrupted.life if self.interrupted is not None else 0

    async def write_intent(self, info: CallInfo, params: Mapping[str, Any]) -> bool:
        """Store that the call begins, with these arguments.

        False if somebody has decided about an earlier intent: then `resolution` is that decision, and nothing
        is stored.
        """
        self._is_written = True
        try:
            decided = await self._effects.write_intent(self, info, params)
        except RunLatched:  # it may be stored, and only its answer lost
            self.report_not_begun(info)
            raise
        if decided is not None:
            self.resolution, self._is_written = decided, False
            return False
        return True

    def failed(self, info: CallInfo, *, may_have_run: bool) -> None:
        """The call has failed, and the run will be suspended. If nobody knows whether the call had its
        effect, its intent stays; otherwise the next attempt makes the call."""
        if not self._is_written:
            return
        if may_have_run:
            self._effects.keep(info.call_id)
        else:
            self._effects.not_executed(info)

    def report_outcome(self, info: CallInfo, record: str) -> None:
        """The call has ended, but another worker owns the run: give it the record (JSON)."""
        if self._is_written:
            outcome = {"action": ResolutionAction.OUTCOME, "record": loads(record)}
            self._effects.report(info.call_id, info.name, outcome)

    def report_not_begun(self, info: CallInfo) -> None:
        """The tool was not called, although the intent is stored, and another worker owns the run."""
        if self._is_written:
            self._effects.report(info.call_id, info.name, {"action": ResolutionAction.RERUN})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _is_unknown(record: Record) -> bool:
    error = record.outcome.get("error")
    return isinstance(error, dict) and error.get("code") == "run.outcome_unknown"
