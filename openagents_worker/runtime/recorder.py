"""The recorder: the only place that answers recorded calls: from the journal, or by making them.

Whatever a recorded call returns or raises is recorded first. Nothing else reaches the program. This holds for
every caller: the pattern, the memory, the context assembler, and calls inside other calls.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from openagents_worker.errors import (
    BudgetExhausted,
    DefinitionChanged,
    MaxStepsExceeded,
    OpenAgentsError,
    PatternError,
    ReplayMismatch,
    StepTooLarge,
    error_from_wire,
)
from openagents_worker.jsontext import ENVELOPE_LEVELS, MAX_NESTING, NestedTooDeeply, replaced
from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.models import RunUsage
from openagents_worker.runtime.call_ids import content_of, outside_runs
from openagents_worker.runtime.journal import Record, check_record
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.rules import CallQuery, ReplayContradiction, Rules
from openagents_worker.runtime.spans import call_span, count_replayed, end_call_span
from openagents_worker.runtime.state import CHANGE_LEVELS
from openagents_worker.runtime.storable import too_deep
from openagents_worker.runtime.user_code import coded, executing, original_of, set_original
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.facts import Fact, FactKind
from openagents_worker.store.formats import BY_PLACE
from openagents_worker.telemetry.logs import get_logger

__all__ = ["MakeCall", "Outcome", "Recorder"]

log = get_logger(__name__)

GIVEN_UP = (None, LatchReason.CANCELLED, LatchReason.TIME_LIMIT)
"""Why a call is cancelled that no later attempt makes again. None: its pattern has cancelled it."""

Event = tuple[str, Mapping[str, Any]]

SHORT_MESSAGE_CHARS = 200  # of an error whose record is too large; the smallest limit is 1,024 bytes
NO_TIME_MS = 10  # a shorter call is recorded as 0 ms: replay waits at least that long for any call


@dataclass(slots=True)
class Outcome:
    """What a call returned or raised, and what is stored in the journal with it."""

    value: Any = None
    error: OpenAgentsError | None = None
    usage: RunUsage = field(default_factory=RunUsage)
    state: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    may_retry: bool = True
    """False if the call must not be repeated, although its error is retryable."""


MakeCall = Callable[[CallInfo], Awaitable[Outcome]]


class _CallInProgress:
    """A call that is being made.

    It is blocked while a call inside it waits for the run to stop, because then it cannot end by itself.
    """

    __slots__ = ("blocked", "may_repeat", "outer", "task")

    def __init__(self, task: asyncio.Task[Any], outer: _CallInProgress | None, *, may_repeat: bool) -> None:
        self.task = task
        self.outer = outer
        self.may_repeat = may_repeat
        self.blocked = 0


_innermost_call: ContextVar[_CallInProgress | None] = ContextVar("openagents_running", default=None)


class Recorder:
    """The recorded calls of one attempt."""

    def __init__(
        self,
        *,
        run_id: str,
        uid: str,
        rules: Rules,
        position: int,
        writer: RunWriter,
        latch: Latch,
        retries: int,
        tries: Mapping[str, int],
        max_tries: int,
        life: int,
        durable: bool,
        max_record_bytes: int,
        definition_changed: bool,
        transcript_length: int,
        on_record: Callable[[Record], None],
        checks: Mapping[str, dict[str, Any]],
        noted: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """`position` is the journal position of the next record.

        `retries` counts the suspensions for a retry since the last record. `tries` counts them per call, or
        per part of the pattern. `checks` are the recorded results of output checks, by digest of the output.
        """
        self.run_id = run_id
        self.usage = RunUsage()
        self.position = position
        self.verdict: OpenAgentsError | None = None
        """An error that ends the run even if the pattern catches it: a budget, a replay mismatch."""
        self.changed_tools: Sequence[str] = ()
        """Tools that are described in another way than when the run began."""
        self.rules = rules
        self._uid = uid
        self._writer = writer
        self._latch = latch
        self._retries = retries
        self._tries = tries
        self._max_tries = max_tries
        self._life = life
        self._durable = durable
        self.max_record_bytes = max_record_bytes
        self._definition_changed = definition_changed
        self._transcript_length = transcript_length
        self._on_record = on_record
        self._checks = dict(checks)
        self._noted = dict(noted or {})
        self._loop = asyncio.get_running_loop()
        self._start: Record | None = None
        self._entered: Counter[str] = Counter()
        self._in_progress: set[_CallInProgress] = set()
        self._stopping = asyncio.Event()
        self._no_call_can_end = asyncio.Event()
        self._no_call_can_end.set()
        self._held_events: defaultdict[str, list[Event]] = defaultdict(list)

    # --- calls -------------------------------------------------------------------------------------------

    async def call(
        self, kind: str, name: str, digest: str, make: MakeCall, *, core: str = "", may_repeat: bool = True
    ) -> Any:
        """Answer a call from the journal; if it is not there, make it, record the outcome and return it.

        `digest` is the digest of the arguments, `core` that of a prompt without its instructions.
        `may_repeat`: whether a cancelled call may be made again, although it may have had side effects.
        """
        query = self.rules.enter(kind, name, digest, core)
        self._entered[kind] += 1
        number = self._entered[kind]
        await self._stop_if_latched()
        record = await self._find_record(query)
        await self._stop_if_latched()
        if record is None:
            self._release_held(query.branch)
            return await self._make_and_answer(query, number, make, may_repeat=may_repeat)
        self._held_events.pop(query.branch, None)  # emitted before this record was stored
        if await self._wait_for_turn(query, record):
            count_replayed(kind)
            return await self._answer_from(record)
        await self._stop_if_latched()
        return await self._make_and_answer(query, number, make, again=record, may_repeat=may_repeat)

    def begin(self, part: str = "") -> None:
        """Make the current task the root of a part of the run; '' is the part of the pattern."""
        self.rules.begin(part)

    def end(self) -> None:
        """The current task makes no more calls of the run."""
        self.rules.end()

    async def _find_record(self, query: CallQuery) -> Record | None:
        """The record that answers the call, None if there is none. Raises `ReplayMismatch`."""
        if isinstance(self.verdict, ReplayMismatch):
            raise self.verdict  # after a mismatch, no call is executed
        try:
            record = await self.rules.find(query)
        except ReplayContradiction as contradiction:
            raise self.mismatch(str(contradiction)) from None
        if record is not None:
            self._emit_changed_prompt(record, query)
        return record

    def _emit_changed_prompt(self, record: Record, query: CallQuery) -> None:
        """Emit an event if the prompt of the call differs from the recorded one."""
        recorded = record.digest or content_of(record.call)
        if recorded != query.content:
            self._writer.emit(
                "replay.prompt_changed",
                {
                    "call_id": record.call,
                    "model": record.name,
                    "recorded_digest": recorded,
                    "digest": query.content,
                },
            )

    async def _wait_for_turn(self, query: CallQuery, record: Record) -> bool:
        """Wait for the turn of the record. If the program cancels the call meanwhile, record that."""
        try:
            return await self.rules.wait_for_turn(query, record)
        except asyncio.CancelledError:
            if self._latch.reason is None and not record.is_cancelled:
                await self._store_shielded(self._cancellation_of(record), [])
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
        self._writer.check_lease()
        call_id = self.rules.assign_id(query, again)
        info = CallInfo(
            run_id=self.run_id,
            call_id=call_id,
            idempotency_key=f"{self.run_id}:{self._uid}:{call_id}",
            ordinal=query.ordinal,
            failed_tries=self.rules.failed_tries(query, call_id),
            requests=self.rules.requests_sent(query, call_id),
            may_suspend=self._durable,
            kind=query.kind,
            name=query.name,
            number=number,
            emit=self._writer.emit,
            noted=self._noted.get(call_id),
            note=partial(self._store_note, call_id) if self._durable else None,
            is_given_up=self._is_given_up,
        )
        with self._track_in_progress(may_repeat):
            record, error = await self._make_and_record(query, info, make)
        await self._stop_if_latched()  # stop before the program continues; the record is stored
        assert record is not None
        return self._answer_with(record, error)

    async def _store_note(self, call_id: str, value: Mapping[str, Any]) -> None:
        """Store a note about a call, before its outcome. Its record replaces the note."""
        self._noted[call_id] = value
        self.store_start()
        await self._writer.write_fact(Fact.of(FactKind.RESPONSE, call_id, dict(value)))

    def _is_given_up(self) -> bool:
        """Whether a call that is being cancelled now will not be made again by a later attempt."""
        return self._latch.reason in GIVEN_UP

    async def _make_and_record(
        self, query: CallQuery, info: CallInfo, make: MakeCall
    ) -> tuple[Record | None, OpenAgentsError | None]:
        """Make the call and store its record. Without a record: the run is suspended for a retry.

        The second value is the error as it was raised.
        """
        began_s = self._loop.time()
        outcome, model_calls = await self._make_outcome(query, info, make, began_s)
        if self._should_retry(outcome, info):
            requests = getattr(outcome.error, "requests", 1)
            tries_key = self.rules.tries_fact(query, info.call_id, requests)
            self._latch.set(LatchReason.RETRY, error=outcome.error, call=tries_key)
            for event in outcome.events:
                self._writer.emit(*event)
            return None, outcome.error
        record, text = self._to_record(query, info, outcome, began_s, model_calls)
        await self._commit(record, text, outcome.events)
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
                outcome = end_call_span(span, info, await make(info))
                return outcome, max(
                    0, getattr(inner, "model_calls", 0) - query.ordinal - _own_model_calls(query)
                )
        except asyncio.CancelledError:
            if self._latch.reason is not None:
                raise RunLatched(self._latch.reason) from None
            cancelled = self._new_record(query, info, {"cancelled": True}, began_s)
            await self._store_shielded(cancelled, [])
            raise
        except Exception as error:  # noqa: BLE001 - an error that is not recorded must not reach the pattern
            return Outcome(error=coded(error, PatternError), may_retry=False), 0
        finally:
            self.rules.call_ended()
            current_call.reset(token)

    @contextmanager
    def _track_in_progress(self, may_repeat: bool) -> Iterator[None]:
        """Count the call as in progress inside the block."""
        task = asyncio.current_task()
        assert task is not None
        call = _CallInProgress(task, _innermost_call.get(), may_repeat=may_repeat)
        token = _innermost_call.set(call)
        self._in_progress.add(call)
        self._no_call_can_end.clear()
        try:
            yield
        finally:
            _innermost_call.reset(token)
            self._in_progress.discard(call)
            self._signal_if_no_call_can_end()

    @contextmanager
    def _outer_calls_blocked(self) -> Iterator[None]:
        """Mark the outer calls of the current call as blocked: `wait_for_calls` does not wait for them."""
        outer = []
        call = _innermost_call.get()
        while call is not None:
            call.blocked += 1
            outer.append(call)
            call = call.outer
        self._signal_if_no_call_can_end()
        try:
            yield
        finally:
            for call in outer:
                call.blocked -= 1

    def _signal_if_no_call_can_end(self) -> None:
        if not self._in_progress or all(call.blocked for call in self._in_progress):
            self._no_call_can_end.set()

    def _should_retry(self, outcome: Outcome, info: CallInfo) -> bool:
        """Whether the run is suspended to retry this call. If the retries are used up, emit an event."""
        error = outcome.error
        if error is None or not error.retryable or not self._durable:
            return False
        if not outcome.may_retry:
            if getattr(error, "is_final", False):  # the requests of a model call are used up
                self._emit_exhausted(error, info.failed_tries)
            return False
        # A prompt that differs in every attempt starts a new count each time; `_retries` limits those.
        in_flight = max(1, sum(not call.blocked for call in self._in_progress))
        if info.failed_tries < self._max_tries and self._retries < self._max_tries * in_flight:
            return True
        self._emit_exhausted(error, info.failed_tries)
        return False

    def _emit_exhausted(self, error: OpenAgentsError, failed_tries: int) -> None:
        self._writer.emit(
            "run.resume_exhausted",
            {
                "run_id": self.run_id,
                "attempt_index": failed_tries + 1,
                "error_type": type(error).__name__,
                "error_code": error.code,
                "limit": self._max_tries,
            },
        )

    def suspend_for_retry(self, error: OpenAgentsError, part: str) -> bool:
        """Suspend the run for a retry, because a part of the pattern failed. False if that is not allowed.

        Calls in progress are cancelled, not recorded, and made again after the retry. A call that must not
        be repeated therefore forbids the retry.
        """
        if self._latch.reason is not None and not self._latch.lets_calls_end:
            return True  # the run is stopping already
        may_repeat = all(call.may_repeat for call in self._in_progress)
        if not (error.retryable and self._durable and may_repeat):
            return False
        failed_tries = self._tries.get(part, 0)
        if failed_tries >= self._max_tries:
            self._emit_exhausted(error, failed_tries)
            return False
        self._latch.set(LatchReason.RETRY, error=error, call=part)
        self._latch.hurry()
        return True

    # --- records -----------------------------------------------------------------------------------------

    def _to_record(
        self, query: CallQuery, info: CallInfo, outcome: Outcome, began_s: float, model_calls: int
    ) -> tuple[Record, str]:
        """The record of an outcome, and its JSON. If it cannot be stored, an error is recorded instead."""
        usage = {k: v for k, v in outcome.usage.model_dump().items() if v not in (0, None, {})}
        more: dict[str, Any] = {"usage": usage, "model_calls": model_calls}
        call = f"{info.kind} {info.name}"
        try:
            if outcome.error is None:
                result = {"ok": replaced(outcome.value, _max_levels(info.kind))}
            else:
                result = {"error": replaced(outcome.error.to_dict(), MAX_NESTING + ENVELOPE_LEVELS)}
            changed: dict[str, Any] = {
                "state": replaced(outcome.state, _max_levels(info.kind) + CHANGE_LEVELS),
                "artifacts": replaced(outcome.artifacts, MAX_NESTING + ENVELOPE_LEVELS),
            }
            record = self._new_record(query, info, result, began_s, **changed, **more)
            text = record.to_json()
            size = len(text.encode())
            if size > self.max_record_bytes and outcome.error is not None:
                # A shortened error says more than an error about its size.
                result["error"]["context"].pop("traceback", None)
                result["error"]["message"] = result["error"]["message"][:SHORT_MESSAGE_CHARS]
                record = self._new_record(query, info, result, began_s, **changed, **more)
                text = record.to_json()
                size = len(text.encode())
            if size <= self.max_record_bytes:
                return record, text
            problem = f"the outcome of {call} has {size:,} bytes, {self.max_record_bytes:,} are allowed"
            not_stored: OpenAgentsError = StepTooLarge(
                problem, hint="return less, or a reference to the data"
            )
        except NestedTooDeeply as error:
            not_stored = too_deep(f"the outcome of {call}", error)
        except (TypeError, ValueError, RecursionError) as error:
            not_stored = StepTooLarge(
                f"the outcome of {call} is not JSON: {error}", hint="return plain JSON values"
            )
        not_stored.run_id = self.run_id
        record = self._new_record(query, info, {"error": not_stored.to_dict()}, began_s, **more)
        return record, record.to_json()

    def _new_record(
        self, query: CallQuery, info: CallInfo, outcome: dict[str, Any], began_s: float, **more: Any
    ) -> Record:
        return Record(
            info.call_id,
            info.kind,
            info.name,
            outcome,
            life=self._life,
            took_ms=took_ms if (took_ms := round((self._loop.time() - began_s) * 1000)) > NO_TIME_MS else 0,
            v=self.rules.format,
            **self.rules.identity(query),
            **more,
        )

    def _cancellation_of(self, record: Record) -> Record:
        """A record for later attempts: the program cancelled this call, although its outcome is recorded."""
        outcome = {"cancelled": True}
        return Record(
            f"{record.call}!", "cancelled", record.name, outcome, life=self._life, v=self.rules.format
        )

    def set_start(self, start: Record) -> None:
        """Set checkpoint 0, the first record of the journal. It is stored later, see `store_start`."""
        self._start = start if self._durable else None

    def store_start(self) -> None:
        """Checkpoint 0 is complete: store it together with the next write."""
        if self._start is not None:
            start, self._start = self._start, None
            _, saved = self._assign_checkpoint(start)
            self._writer.defer_start(start.to_json(), saved)

    async def _commit(self, record: Record, text: str, events: list[Event]) -> None:
        """Store a record, even if the task that made the call is cancelled."""
        try:
            await self._store_shielded(record, events, text)
            await self.rules.after_stored(record.took_ms)
        except asyncio.CancelledError:
            if self._latch.reason is None:
                # The outcome is stored, but the program sees a cancellation. Replay must show it the same.
                await self._store_shielded(self._cancellation_of(record), [])
            raise

    async def _store_shielded(self, record: Record, events: list[Event], text: str = "") -> None:
        """Store a record. A cancellation during the write is raised after the write."""
        storing = outside_runs(self._store(record, events, text), name=f"commit {self.run_id} {record.call}")
        try:
            await asyncio.shield(storing)
        except asyncio.CancelledError:
            await asyncio.wait([storing])
            storing.result()
            raise

    async def _store(self, record: Record, events: list[Event], text: str) -> None:
        """Write a record with its events and the new usage of the run."""
        self.store_start()
        self._writer.end_deltas(record.call)
        usage = self.usage.plus(RunUsage(**record.usage)) if record.usage else self.usage
        if record.usage:
            events = [*events, ("usage.updated", {"usage": usage.model_dump(exclude_defaults=True)})]
        if not self._durable:
            self.usage = usage
            for event in events:
                self._writer.emit(*event)
            return
        position, saved = self._assign_checkpoint(record)
        self.usage = usage
        noted = self._noted.pop(record.call, None)
        await self._writer.commit(
            position,
            text or record.to_json(),
            usage,
            [*events, saved],
            taken=() if noted is None else [Fact(FactKind.RESPONSE, record.call, "").name],
        )

    # --- checks of the run's output ----------------------------------------------------------------------

    def recorded_check(self, key: str) -> dict[str, Any] | None:
        """The recorded result of the check of an output; None if it was not checked yet.

        `key` is the digest of the output.
        """
        return self._checks.get(key)

    def record_check(self, key: str, outcome: dict[str, Any]) -> None:
        """Record the result of a check. It is stored with the next record, without a further round trip."""
        self._checks[key] = outcome
        if not self._durable or self.rules.format == BY_PLACE:
            return
        self.store_start()
        record = check_record(key, outcome, life=self._life)
        position, saved = self._assign_checkpoint(record)
        self._writer.defer_record(position, record.to_json(), self.usage, saved)

    def _assign_checkpoint(self, record: Record) -> tuple[int, Event]:
        """Assign the next journal position. Returns it with the event `run.checkpoint_saved`."""
        position, self.position = self.position, self.position + 1
        payload = {
            "checkpoint_id": f"{self.run_id}:step:{position}",
            "step_index": position,
            "transcript_length": self._transcript_length,
            "call_id": record.call,
        }
        return position, ("run.checkpoint_saved", payload)

    # --- replay ------------------------------------------------------------------------------------------

    def mismatch(self, problem: str) -> ReplayMismatch:
        """The error for a program that contradicts its journal. From now on no call is executed."""
        kind, hint = (
            ReplayMismatch,
            "only recorded calls may use the time or random numbers; was the pattern changed?",
        )
        if self._definition_changed or self.changed_tools:
            kind, hint = (
                DefinitionChanged,
                "submit the run again, or restore the previous definition of the agent",
            )
        if self.changed_tools:
            problem += f"; changed since the run began: {', '.join(self.changed_tools)}"
        error = kind(problem, hint=hint, run_id=self.run_id)
        self.verdict = self.verdict or error
        return error

    async def _answer_from(self, record: Record) -> Any:
        """Return or raise the outcome of a record of an earlier attempt, and count its usage."""
        for inner in self.rules.records_inside(record):
            self.usage = self.usage.plus(RunUsage(**inner.usage))
            self._on_record(inner)
        self.usage = self.usage.plus(RunUsage(**record.usage))
        if self.rules.is_replayed:
            for branch in list(self._held_events):
                self._release_held(branch)
        await self._stop_if_latched()
        return self._answer_with(record)

    def _answer_with(self, record: Record, made: OpenAgentsError | None = None) -> Any:
        """Return or raise the outcome of a record. `made` is the original error of a call just made."""
        self._on_record(record)
        if "error" in record.outcome:
            error = error_from_wire(record.outcome["error"])
            if made is not None and made.code == error.code:
                set_original(error, original_of(made))
            if isinstance(error, BudgetExhausted | MaxStepsExceeded):
                self.verdict = error  # a pattern cannot continue past a budget
            raise error
        return record.outcome.get("ok")

    # --- events of the pattern ---------------------------------------------------------------------------

    def _emit_or_hold(self, name: str, payload: Mapping[str, Any]) -> None:
        """Emit an event of the pattern; hold it back while its branch is replayed.

        An event before a replayed call was emitted by an earlier attempt: it is dropped. Raises
        `StepTooLarge`, in each attempt.
        """
        if self.rules.is_replayed or self.rules.is_inside_a_call():
            self._emit_user_event(name, payload)
        else:
            self._writer.check_event(name, payload)
            self._held_events[self.rules.branch()].append((name, payload))

    async def emit(self, name: str, payload: Mapping[str, Any]) -> None:
        """Emit an event of the pattern. Wait while too many events are queued. Raises `StepTooLarge`."""
        self._emit_or_hold(name, payload)
        if self._writer.is_full:
            await self._writer.wait_for_space()
            await self._stop_if_latched()

    def _release_held(self, branch: str) -> None:
        """Emit the held events of a branch: it has left its recorded part."""
        for event in self._held_events.pop(branch, ()):
            self._emit_user_event(*event)

    def _emit_user_event(self, name: str, payload: Mapping[str, Any]) -> None:
        self._writer.emit_user_event(name, payload)
        if name == "tool.failed":  # for example, the model called a tool that does not exist
            fields: dict[str, Any] = {
                key: payload[key] for key in ("tool_id", "code", "message") if key in payload
            }
            log.warning("tool.failed", run_id=self.run_id, **fields)

    # --- the end of the attempt --------------------------------------------------------------------------

    async def _stop_if_latched(self) -> None:
        """Raise `RunLatched` if the run is latched.

        If other calls may still end, wait for them first. An error in this call now would make the program
        cancel them.
        """
        if self._latch.reason is None:
            return
        if self._latch.lets_calls_end:
            with self._outer_calls_blocked():
                await self._stopping.wait()
        raise RunLatched(self._latch.reason)

    async def wait_for_calls(self) -> None:
        """Return when no call in progress can still end by itself."""
        await self._no_call_can_end.wait()

    def cancel_calls(self) -> None:
        """Cancel the calls in progress; calls that wait for the stop raise `RunLatched`."""
        self._stopping.set()
        for call in list(self._in_progress):
            call.task.cancel()

    async def check_all_read(self, part: str = "") -> None:
        """Raises `ReplayMismatch` if a part of the run ended and records of it were not used."""
        unused = await self.rules.unused_records(part)
        if unused and self._latch.reason is None:
            raise self.mismatch(
                f"the program ended without making calls that the journal holds: {', '.join(unused[:3])}"
            )


def _max_levels(kind: str) -> int:
    """The nesting limit for the result of a kind of call.

    A model's reply and a memory's view contain tool arguments and results, each of which may have
    `MAX_NESTING` levels.
    """
    return MAX_NESTING if kind == "tool" else MAX_NESTING + ENVELOPE_LEVELS


def _own_model_calls(query: CallQuery) -> int:
    """1 for a call that is itself a model call, else 0."""
    return 1 if query.kind in ("model", "http") else 0
