"""Outcomes: the only place that turns what a recorded call returned or raised into its record."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from openagents_worker.errors import OpenAgentsError, StepTooLarge
from openagents_worker.jsontext import ENVELOPE_LEVELS, MAX_NESTING, NestedTooDeeply, replaced, size_of
from openagents_worker.llm.base import CallInfo
from openagents_worker.llm.limits import LimitWait
from openagents_worker.models import RunArtifact, RunUsage
from openagents_worker.models.usage import NO_USAGE
from openagents_worker.runtime.call_counts import CallCounts
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.rules import CallQuery, Rules
from openagents_worker.runtime.state import CHANGE_LEVELS
from openagents_worker.runtime.storable import too_deep

__all__ = ["Event", "MakeCall", "NewRecords", "Outcome", "RecordedContext", "took_ms"]

Event = tuple[str, Mapping[str, Any]]

NO_TIME_MS = 10  # a shorter call is recorded as 0 ms: replay waits at least that long for any call
SHORT_MESSAGE_CHARS = 200  # of an error whose record is too large; the smallest limit is 1,024 bytes


@dataclass(slots=True)
class Outcome:
    """What a call returned or raised, and what is stored in the journal with it."""

    value: Any = None
    error: OpenAgentsError | None = None
    usage: RunUsage = field(default_factory=lambda: NO_USAGE)
    state: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    """Names of facts that the record replaces."""
    may_retry: bool = True
    """False if the call must not be repeated, although its error is retryable."""
    decision: Mapping[str, Any] | None = None
    """The decision about the approval of the call, as it is stored with the outcome."""
    is_accepted: bool = False
    """Whether the value came from outside and was accepted: its producer has got no error for its size."""
    is_stored_form: bool = False
    """Whether value, state and artifacts are already as they are stored, see `storable`."""
    waits_for: LimitWait | None = None
    """The limit of the fleet for which the run must wait; then the call has no outcome yet."""
    report: Callable[[OpenAgentsError | None], None] | None = None
    """Reports how the call ended, just before its record is stored. Its argument is the error that is
    recorded because the outcome cannot be stored, else None."""


MakeCall = Callable[[CallInfo], Awaitable[Outcome]]


class RecordedContext(Protocol):
    """The parts of the context of a run that recorded calls change."""

    @property
    def state(self) -> dict[str, Any]: ...

    @property
    def artifacts(self) -> list[RunArtifact]: ...


class NewRecords:
    """Makes the records of one attempt."""

    def __init__(self, identity: RunIdentity, rules: Rules, counts: CallCounts, max_bytes: int) -> None:
        self._run_id = identity.run_id
        self._life = identity.life
        self._rules = rules
        self._counts = counts
        self._max_bytes = max_bytes

    def of(
        self, query: CallQuery, info: CallInfo, outcome: Outcome, *, took_ms: int, model_calls: int
    ) -> tuple[Record, str]:
        """The record of an outcome, and its JSON. If it cannot be stored, an error is recorded instead."""
        record, text, not_stored = self._storable(query, info, outcome, took_ms, model_calls)
        if outcome.report is not None:
            outcome.report(not_stored)
        return record, text

    def _storable(
        self, query: CallQuery, info: CallInfo, outcome: Outcome, took_ms: int, model_calls: int
    ) -> tuple[Record, str, OpenAgentsError | None]:
        """Like `of`. The third value is the error that is recorded instead of the outcome."""
        usage = outcome.usage.counted()
        more: dict[str, Any] = {"usage": usage, "model_calls": model_calls}
        call = f"{info.kind} {info.name}"
        try:
            stored = _as_stored(outcome, _max_levels(info.kind))
            result = (
                {"ok": stored.value}
                if outcome.error is None
                else {"error": replaced(outcome.error.to_dict(), MAX_NESTING + ENVELOPE_LEVELS)}
            )
            if outcome.decision is not None:
                result["decision"] = dict(outcome.decision)
            changed: dict[str, Any] = {"state": stored.state, "artifacts": stored.artifacts}
            record = self.new(query, info, result, took_ms, **changed, **more)
            text = record.to_json()
            size = len(text.encode())
            if size > self._max_bytes and outcome.error is not None:
                # A shortened error says more than an error about its size.
                result["error"]["context"].pop("traceback", None)
                result["error"]["message"] = result["error"]["message"][:SHORT_MESSAGE_CHARS]
                record = self.new(query, info, result, took_ms, **changed, **more)
                text = record.to_json()
                size = len(text.encode())
            if size <= self._max_bytes or size <= self._max_bytes + _accepted_bytes(outcome, size):
                return record, text, None
            problem = f"the outcome of {call} has {size:,} bytes, {self._max_bytes:,} are allowed"
            not_stored: OpenAgentsError = StepTooLarge(
                problem, hint="return less, or a reference to the data"
            )
        except NestedTooDeeply as error:
            not_stored = too_deep(f"the outcome of {call}", error)
        except (TypeError, ValueError, RecursionError) as error:
            not_stored = StepTooLarge(
                f"the outcome of {call} is not JSON: {error}", hint="return plain JSON values"
            )
        not_stored.run_id = self._run_id
        record = self.new(query, info, {"error": not_stored.to_dict()}, took_ms, **more)
        return record, record.to_json(), not_stored

    def new(
        self, query: CallQuery, info: CallInfo, outcome: dict[str, Any], took_ms: int = 0, **more: Any
    ) -> Record:
        return Record(
            info.call_id,
            info.kind,
            info.name,
            self._counts.with_steps(info.call_id, outcome),
            life=self._life,
            took_ms=took_ms,
            v=self._rules.format,
            **self._rules.identity(query),
            **more,
        )

    def cancellation_of(self, record: Record) -> Record:
        """A record for later attempts: the program cancelled this call, although its outcome is recorded."""
        outcome = {"cancelled": True}
        return Record(
            f"{record.call}!",
            "cancelled",
            record.name,
            outcome,
            life=self._life,
            v=self._rules.format,
        )


def _accepted_bytes(outcome: Outcome, size: int) -> int:
    """How many bytes of a record of this size were accepted before its call was made."""
    if outcome.is_accepted:
        return size
    return 0 if outcome.decision is None else size_of(dict(outcome.decision))


def took_ms(duration_s: float) -> int:
    """The duration of a call as it is recorded."""
    duration_ms = round(duration_s * 1000)
    return duration_ms if duration_ms > NO_TIME_MS else 0


def _as_stored(outcome: Outcome, levels: int) -> Outcome:
    """The outcome with value, state and artifacts as they are stored. Raises like `replaced`."""
    if outcome.is_stored_form:
        return outcome
    return replace(
        outcome,
        value=replaced(outcome.value, levels),
        state=replaced(outcome.state, levels + CHANGE_LEVELS),
        artifacts=replaced(outcome.artifacts, MAX_NESTING + ENVELOPE_LEVELS),
    )


def _max_levels(kind: str) -> int:
    """The nesting limit for the result of a kind of call.

    A model's reply and a memory's view contain tool arguments and results, each of which may have
    `MAX_NESTING` levels.
    """
    return MAX_NESTING if kind == "tool" else MAX_NESTING + ENVELOPE_LEVELS
