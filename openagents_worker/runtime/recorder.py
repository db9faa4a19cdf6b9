"""The recorder: the only place that answers recorded calls: from the journal, or by making them.

Whatever a recorded call returns or raises is recorded first. Nothing else reaches the program. This holds for
every caller: the pattern, the memory, the context assembler, and calls inside other calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any

from openagents_worker.errors import (
    BudgetExhausted,
    MaxStepsExceeded,
    OpenAgentsError,
    OutcomeUnknown,
    PatternError,
    ReplayMismatch,
    error_from_wire,
)
from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.llm.limits import FleetLimits
from openagents_worker.models import RunArtifact, RunUsage, WaitKind
from openagents_worker.models.budget import NO_LIMITS
from openagents_worker.runtime.announcements import Announcements
from openagents_worker.runtime.approvals import Approvals
from openagents_worker.runtime.call_counts import CallCounts
from openagents_worker.runtime.call_outcome import (
    MakeCall,
    NewRecords,
    Outcome,
    RecordedContext,
    took_ms,
)
from openagents_worker.runtime.calls_in_progress import CallInProgress, CallsInProgress
from openagents_worker.runtime.checkpoints import Checkpoints
from openagents_worker.runtime.effects import Effects
from openagents_worker.runtime.facts import RunFacts
from openagents_worker.runtime.history import RunHistory
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.journal import Record
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.model_metrics import ModelMetrics
from openagents_worker.runtime.pattern_events import PatternEvents
from openagents_worker.runtime.retry import Retries
from openagents_worker.runtime.rules import EXTEND, CallQuery, ReplayContradiction, model_calls_inside
from openagents_worker.runtime.spans import call_span, count_replayed, end_call_span
from openagents_worker.runtime.spending import Spending
from openagents_worker.runtime.state import apply_changes
from openagents_worker.runtime.user_code import coded, executing, original_of, set_original
from openagents_worker.runtime.waits import Waits
from openagents_worker.runtime.working_budget import WorkingBudget, limits_in
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.scripts import Claimed

__all__ = ["MakeCall", "Outcome", "Recorder"]


class Recorder:
    """The recorded calls of one attempt."""

    def __init__(
        self,
        identity: RunIdentity,
        history: RunHistory,
        *,
        claimed: Claimed,
        writer: RunWriter,
        latch: Latch,
        max_record_bytes: int,
        facts: RunFacts,
    ) -> None:
        durable = claimed.durable
        self.counts = CallCounts()
        self._records = NewRecords(identity, history.rules, self.counts, max_record_bytes)
        self.effects = Effects(history.interrupted, self._records, writer)
        """The calls that must not be repeated without permission."""
        self.approvals = Approvals(history.facts, writer)
        self.announced = Announcements(history, identity.life, writer, latch, self.approvals, self.effects)
        self.checkpoints = Checkpoints(identity, history, writer, self.effects, durable=durable)
        self.verdict: OpenAgentsError | None = None
        """An error that ends the run even if the pattern catches it: a budget, a replay mismatch."""
        self.changed_tools: Sequence[str] = ()
        """Tools that are described in another way than when the run began."""
        self.rules = history.rules
        self.max_record_bytes = max_record_bytes
        self.context: RecordedContext | None = None
        """What the records change. Set before the first call."""
        self.limits: FleetLimits | None = None
        """The limits of the fleet for model calls. Set before the first call."""
        self.budget = WorkingBudget(NO_LIMITS, durable=durable)
        """The limits of the run. Set before the first call."""
        self.spending = Spending()
        self.metrics = ModelMetrics()
        self._identity = identity
        self._history = history
        self._writer = writer
        self._latch = latch
        self._durable = durable
        self._replays_only = claimed.is_interrupted
        """Whether the first call that is not in the journal ends the run."""
        self._loop = asyncio.get_running_loop()
        self.in_progress = CallsInProgress()
        self.in_progress.when_blocked = self.rules.call_ended
        self.in_progress.when_unblocked = self.rules.call_begins
        self.waits = Waits(
            facts, writer=writer, latch=latch, calls=self.in_progress, rules=self.rules, durable=durable
        )
        self._retries = Retries(history.tries, writer, latch, self.in_progress, durable=durable)
        self._pattern_events = PatternEvents(history.rules, writer)

    # --- calls -------------------------------------------------------------------------------------------

    async def call(
        self, kind: str, name: str, digest: str, make: MakeCall, *, core: str = "", may_repeat: bool = True
    ) -> Any:
        """Answer a call from the journal; if it is not there, make it, record the outcome and return it.

        `digest` is the digest of the arguments, `core` that of a prompt without its instructions.
        `may_repeat`: whether a cancelled call may be made again, although it may have had side effects.
        """
        query = self.rules.enter(kind, name, digest, core)
        number = self.counts.enter(kind)
        if self._latch.reason is not None:
            await self._stop_if_latched()
        record = await self._find_record(query)
        if self._latch.reason is not None:
            await self._stop_if_latched()
        if record is None:
            self._pattern_events.release(query.branch)
            return await self._make_and_answer(query, number, make, may_repeat=may_repeat)
        self._pattern_events.drop(query.branch)  # emitted before this record was stored
        if await self._wait_for_turn(query, record):
            count_replayed(kind)
            return await self._answer_from(record)
        await self._stop_if_latched()
        return await self._make_and_answer(query, number, make, again=record, may_repeat=may_repeat)

    @property
    def is_durable(self) -> bool:
        return self._durable

    @property
    def is_latched(self) -> bool:
        """Whether this attempt stops, for whatever reason."""
        return self._latch.reason is not None

    @property
    def run_id(self) -> str:
        return self._identity.run_id

    @property
    def life(self) -> int:
        return self._identity.life

    def replaces(self, call_id: str, fact_name: str) -> None:
        """The record of this call will replace this fact."""
        self.effects.replaces(call_id, fact_name)

    @property
    def usage(self) -> RunUsage:
        """The usage of the run so far."""
        return self.checkpoints.usage

    def begin_part(self, part: str = "") -> None:
        """Make the current task the root of a part of the run; '' is the part of the pattern."""
        self.rules.begin(part)

    def end_parts(self) -> None:
        """The current task makes no more calls of the run."""
        self.rules.end()

    async def _find_record(self, query: CallQuery) -> Record | None:
        """The record that answers the call, None if there is none. Raises `ReplayMismatch`."""
        if self.verdict is not None and isinstance(self.verdict, ReplayMismatch | OutcomeUnknown):
            raise self.verdict  # after it, no call is executed
        try:
            record = await self.rules.find(query)
        except ReplayContradiction as contradiction:
            raise self.mismatch(str(contradiction)) from None
        if record is not None:
            self._pattern_events.emit_changed_prompt(record, query)
        return record

    async def _wait_for_turn(self, query: CallQuery, record: Record) -> bool:
        """Wait for the turn of the record. If the program cancels the call meanwhile, record that."""
        try:
            return await self.rules.wait_for_turn(query, record)
        except asyncio.CancelledError:
            self._count_replayed(record)
            if self._latch.reason is None and not record.is_cancelled:
                await self.checkpoints.store(self._records.cancellation_of(record), [])
            raise

    async def _make_and_answer(
        self,
        query: CallQuery,
        number: int,
        make: MakeCall,
        *,
        again: Record | None = None,
        may_repeat: bool = True,
    ) -> Any:
        """Make a call and record it, then return or raise its outcome. `again`: its earlier cancellation."""
        self._writer.store.check_lease()
        if self._replays_only:
            self._latch.set(LatchReason.CANCELLED)
            raise RunLatched(LatchReason.CANCELLED)
        call_id = self.rules.assign_id(query, again)
        effect = None
        if not may_repeat and self._durable:
            effect = self.effects.of(query, call_id, self.rules.begun_as(query, call_id))
        info = CallInfo(
            run_id=self._identity.run_id,
            call_id=call_id,
            idempotency_key=(effect and effect.idempotency_key)
            or f"{self._identity.run_id}:{self._identity.uid}:{call_id}",
            ordinal=query.ordinal,
            failed_tries=self.rules.failed_tries(query, call_id),
            requests=self.rules.requests_sent(query, call_id),
            may_suspend=self._durable,
            kind=query.kind,
            name=query.name,
            number=number,
            emit=self._writer.emit,
            noted=self.checkpoints.noted.get(call_id),
            note=partial(self.checkpoints.store_note, call_id) if self._durable else None,
            is_given_up=self._latch.gives_up_calls,
            tenant=self._identity.tenant,
            limits=self.limits,
            effect=effect,
        )
        with CallInProgress(self.in_progress, call_id=call_id, may_repeat=may_repeat):
            record, error = await self._make_and_record(query, info, make)
        if self._latch.reason is not None:
            await self._stop_if_latched(may_go_on=record is not None)  # before the program continues
        assert record is not None
        return self._answer_with(record, error)

    async def _make_and_record(
        self, query: CallQuery, info: CallInfo, make: MakeCall
    ) -> tuple[Record | None, OpenAgentsError | None]:
        """Make the call and store its record. Without a record: the run is suspended, and makes it later.

        The second value is the error as it was raised.
        """
        began_s = self._loop.time()
        outcome, model_calls = await self._make_outcome(query, info, make, began_s)
        if outcome.waits_for is not None:
            self.waits.park_for_limit(info.call_id, outcome.waits_for)
            return None, None
        if outcome.error is not None and self._retries.should_retry(outcome.error, outcome, info):
            tries_key = self.rules.tries_fact(query, info.call_id, getattr(outcome.error, "requests", 1))
            self._latch.set(LatchReason.RETRY, error=outcome.error, call=tries_key)
            for event in outcome.events:
                self._writer.emit(*event)
            return None, outcome.error
        took = took_ms(self._loop.time() - began_s)
        record, text = self._records.of(query, info, outcome, took_ms=took, model_calls=model_calls)
        taken = [*outcome.taken, *self.waits.taken_by(info.call_id)]
        try:
            await self._commit(record, text, outcome, taken)
        except RunLatched:
            if info.effect is not None and self._latch.reason is LatchReason.FENCED:
                info.effect.report_outcome(info, text)
            raise
        return record, outcome.error

    async def _make_outcome(
        self, query: CallQuery, info: CallInfo, make: MakeCall, began_s: float
    ) -> tuple[Outcome, int]:
        """Make the call. Returns its outcome, and the number of model calls made inside it."""
        token = current_call.set(info)
        self.rules.call_begins()
        try:
            with (
                self.rules.inside(query, info.call_id) as inner,
                executing(info.kind, info.name, info.call_id),
                call_span(info) as span,
            ):
                outcome = end_call_span(span, self._identity, info, await make(info), began_s=began_s)
                return outcome, model_calls_inside(query, inner)
        except asyncio.CancelledError:
            if self._latch.reason is not None:
                raise RunLatched(self._latch.reason) from None
            cancelled = self._records.new(
                query, info, {"cancelled": True}, took_ms(self._loop.time() - began_s)
            )
            await self.checkpoints.store(cancelled, [], taken=self.waits.taken_by(info.call_id))
            raise
        except Exception as error:  # noqa: BLE001 - an error that is not recorded must not reach the pattern
            return Outcome(error=coded(error, PatternError), may_retry=False), 0
        finally:
            self.rules.call_ended()
            current_call.reset(token)

    def derived(self) -> bytes:
        """Random bytes that are the same in every attempt: they derive from the run and from the place."""
        seed = f"{self._history.seeds.at(self.rules)}\0{self.rules.draw()}"
        return blake2b(seed.encode(errors="surrogatepass"), digest_size=32).digest()

    def suspend_for_retry(self, error: OpenAgentsError, part: str) -> bool:
        """Suspend the run for a retry, because a part of the pattern failed. False if that is refused."""
        return self._retries.suspend(error, part)

    async def _commit(self, record: Record, text: str, outcome: Outcome, taken: Sequence[str]) -> None:
        """Store a record, even if the task that made the call is cancelled."""
        try:
            await self.checkpoints.store(record, outcome.events, text, outcome.usage, taken)
            await self.rules.after_stored(record.took_ms)
        except asyncio.CancelledError:
            if self._latch.reason is None:
                # The outcome is stored, but the program sees a cancellation. Replay must show it the same.
                await self.checkpoints.store(self._records.cancellation_of(record), [])
            raise

    # --- replay ------------------------------------------------------------------------------------------

    def mismatch(self, problem: str) -> ReplayMismatch:
        """The error for a program that contradicts its journal. From now on no call is executed."""
        error = self._history.mismatch(problem, self.run_id, self.changed_tools)
        self.verdict = self.verdict or error
        return error

    async def _answer_from(self, record: Record) -> Any:
        """Return or raise the outcome of a record of an earlier attempt, and count its usage."""
        self._count_replayed(record)
        self._pattern_events.release_all_if_replayed()
        await self._stop_if_latched(may_go_on=False)
        return self._answer_with(record)

    def _count_replayed(self, record: Record) -> None:
        """Count a call that is not made again. What the calls inside it have changed applies, too."""
        for inner in self.rules.records_inside(record):
            self.counts.enter(inner.kind)
            self.counts.count_steps_of(inner)
            self.checkpoints.usage = self.usage.plus(RunUsage(**inner.usage))
            self._apply(inner)
        self.counts.count_steps_of(record)
        self.checkpoints.usage = self.usage.plus(RunUsage(**record.usage))

    def _apply(self, record: Record) -> None:
        """Apply the state changes and artifacts of a record to the context of the run, and an extension."""
        self.metrics.add(record)
        if record.kind == EXTEND:
            self.budget.extend(limits_in(record.outcome.get("ok")))
            self.waits.check_again(WaitKind.BUDGET)
        self.spending.count_child(record)
        if not (record.state or record.artifacts):
            return
        assert self.context is not None
        apply_changes(self.context.state, record.state)
        for artifact in record.artifacts:
            self.context.artifacts.append(RunArtifact.model_validate(artifact))

    def _answer_with(self, record: Record, made: OpenAgentsError | None = None) -> Any:
        """Return or raise the outcome of a record. `made` is the original error of a call just made."""
        self._apply(record)
        if "error" in record.outcome:
            error = error_from_wire(record.outcome["error"])
            if made is not None and made.code == error.code:
                set_original(error, original_of(made))
            if isinstance(error, BudgetExhausted | MaxStepsExceeded | OutcomeUnknown):
                self.verdict = error  # a pattern cannot continue past it
            raise error
        return record.outcome.get("ok")

    async def emit(self, name: str, payload: Mapping[str, Any]) -> None:
        """Emit an event of the pattern. Wait while too many events are queued. Raises `StepTooLarge`."""
        self._pattern_events.emit_or_hold(name, payload)
        if self._writer.is_full:
            await self._writer.wait_for_space()
            await self._stop_if_latched()

    # --- the end of the attempt --------------------------------------------------------------------------

    async def _stop_if_latched(self, *, may_go_on: bool = True) -> None:
        """Raise `RunLatched` if the run is latched. A call with effects may go on, with the calls in it.

        If other calls may still end, wait for them. An error now would make the program cancel them.
        """
        if self._latch.reason is None:
            return
        if self._latch.lets_calls_end:
            if may_go_on and self.in_progress.goes_on and not self.rules.has_unused:
                return
            await self.in_progress.wait_for_stop()
        raise RunLatched(self._latch.reason)

    async def check_all_read(self, part: str = "") -> None:
        """Raises `ReplayMismatch` if a part of the run ended and records of it were not used."""
        unused = await self.rules.unused_records(part)
        if unused and self._latch.reason is None:
            raise self.mismatch(
                f"the program ended without making calls that the journal holds: {', '.join(unused[:3])}"
            )
