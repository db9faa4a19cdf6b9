"""The recorder: every recorded call is answered here, from the journal or made and recorded.

Whatever crosses this border back into the program has been recorded first, value or exception; what is not
recorded never reaches the program. It is the same wherever a call is made: by the pattern, by a memory, by an
assembler, inside another call.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
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
from openagents_worker.runtime.rules import Question, ReplayContradiction, Rules
from openagents_worker.runtime.state import CHANGE_LEVELS
from openagents_worker.runtime.storable import too_deep
from openagents_worker.runtime.user_code import coded, executing, original_of, stand_for
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.formats import BY_PLACE
from openagents_worker.telemetry.logs import get_logger

__all__ = ["Make", "Outcome", "Recorder"]

log = get_logger(__name__)

Event = tuple[str, Mapping[str, Any]]

SHORT_MESSAGE_CHARS = 200  # of an error whose record would be too large; the smallest limit is 1,024 bytes
NO_TIME_MS = 10  # a call that took no longer took no time: replay allows for that much anyway


@dataclass(slots=True)
class Outcome:
    """What making a call gave: a value or an error, and what goes into the journal with it."""

    value: Any = None
    error: OpenAgentsError | None = None
    usage: RunUsage = field(default_factory=RunUsage)
    state: dict[str, Any] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    may_retry: bool = True
    """False when the call must not be made again although its error is retryable."""


Make = Callable[[CallInfo], Awaitable[Outcome]]


class _Running:
    """A call that is being made. It is blocked while a call inside it waits for the run to stop: then it
    cannot end by itself."""

    __slots__ = ("blocked", "may_repeat", "outer", "task")

    def __init__(self, task: asyncio.Task[Any], outer: _Running | None, *, may_repeat: bool) -> None:
        self.task = task
        self.outer = outer
        self.may_repeat = may_repeat
        self.blocked = 0


_running: ContextVar[_Running | None] = ContextVar("openagents_running", default=None)


class Recorder:
    """The recorded calls of one attempt."""

    def __init__(
        self,
        *,
        run_id: str,
        uid: str,
        rules: Rules,
        position: int,
        ledger: RunWriter,
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
    ) -> None:
        """`position` is that of the next record; `retries`: how often the run was put off since the last;
        `tries`: how often each call or part of the pattern has failed and was put off; `checks`: what the
        checks of the run's output have given."""
        self.run_id = run_id
        self.usage = RunUsage()
        self.position = position
        self.verdict: OpenAgentsError | None = None
        """An error that ends the run whatever the pattern makes of it: a budget, a mismatch."""
        self.rules = rules
        self._uid = uid
        self._ledger = ledger
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
        self._loop = asyncio.get_running_loop()
        self._start: Record | None = None
        self._entered: Counter[str] = Counter()
        self._running: set[_Running] = set()
        self._stopping = asyncio.Event()
        self._nothing_runs = asyncio.Event()
        self._nothing_runs.set()
        self._held: defaultdict[str, list[Event]] = defaultdict(list)

    # --- calls -------------------------------------------------------------------------------------------

    async def call(
        self, kind: str, name: str, digest: str, make: Make, *, core: str = "", may_repeat: bool = True
    ) -> Any:
        """Answer a call from the journal, or make it, record it and then answer.

        `digest` is that of its arguments; `core`, for a prompt, that of the part the program itself wrote.
        `may_repeat`: whether it may be made again after it was cancelled, although it may have had effects.
        """
        question = self.rules.enter(kind, name, digest, core)
        self._entered[kind] += 1
        number = self._entered[kind]
        await self._stop_if_latched()
        record = await self._find(question)
        await self._stop_if_latched()
        if record is None:
            self._release_held(question.branch)
            return await self._make(question, number, make, may_repeat=may_repeat)
        self._held.pop(question.branch, None)  # said before this record was stored
        if await self._hand_out(question, record):
            return await self._replay(record)
        await self._stop_if_latched()
        return await self._make(question, number, make, again=record, may_repeat=may_repeat)

    def begin(self, part: str = "") -> None:
        """The task that runs now makes the run's calls; `part` sets those around the pattern apart."""
        self.rules.begin(part)

    def end(self) -> None:
        """The task that runs now makes no more of the run's calls."""
        self.rules.end()

    async def _find(self, question: Question) -> Record | None:
        if isinstance(self.verdict, ReplayMismatch):
            raise self.verdict  # nothing is executed any more
        try:
            record = await self.rules.find(question)
        except ReplayContradiction as contradiction:
            raise self.mismatch(str(contradiction)) from None
        if record is not None:
            self._tell_changed_prompt(record, question)
        return record

    def _tell_changed_prompt(self, record: Record, question: Question) -> None:
        recorded = record.digest or content_of(record.call)
        if recorded != question.content:
            self._ledger.note(
                "replay.prompt_changed",
                {
                    "call_id": record.call,
                    "model": record.name,
                    "recorded_digest": recorded,
                    "digest": question.content,
                },
            )

    async def _hand_out(self, question: Question, record: Record) -> bool:
        """Wait for the record's turn. Where the program cancels the call meanwhile, later attempts do so."""
        try:
            return await self.rules.hand_out(question, record)
        except asyncio.CancelledError:
            if self._latch.reason is None and not record.is_cancelled:
                await self._store_unbroken(self._told_cancelled(record), [])
            raise

    async def _make(
        self,
        question: Question,
        number: int,
        make: Make,
        *,
        again: Record | None = None,
        may_repeat: bool = True,
    ) -> Any:
        self._ledger.check_lease()
        call_id = self.rules.claim_id(question, again)
        info = CallInfo(
            run_id=self.run_id,
            call_key=call_id,
            idempotency_key=f"{self.run_id}:{self._uid}:{call_id}",
            ordinal=question.ordinal,
            failed_tries=self.rules.failed_tries(question, call_id),
            kind=question.kind,
            name=question.name,
            number=number,
            emit=self._ledger.note,
        )
        with self._counted_as_running(may_repeat):
            record, error = await self._made(question, info, make)
        await self._stop_if_latched()  # it is stored; a run that is to stop stops before the program goes on
        assert record is not None
        return self._apply(record, error)

    async def _made(
        self, question: Question, info: CallInfo, make: Make
    ) -> tuple[Record | None, OpenAgentsError | None]:
        """Make the call and store its record, None when it is put off; with it the error itself."""
        began_s = self._loop.time()
        outcome, model_calls = await self._outcome(question, info, make, began_s)
        if self._is_to_be_retried(outcome, info):
            fact = self.rules.tries_fact(question, info.call_key)
            self._latch.set(LatchReason.RETRY, error=outcome.error, call=fact)
            for event in outcome.events:
                self._ledger.note(*event)
            return None, outcome.error
        record, text = self._record(question, info, outcome, began_s, model_calls)
        await self._commit(record, text, outcome.events)
        return record, outcome.error

    async def _outcome(
        self, question: Question, info: CallInfo, make: Make, began_s: float
    ) -> tuple[Outcome, int]:
        """What making the call gave, and how many calls of models were made inside it."""
        token = current_call.set(info)
        self.rules.begun()
        try:
            with (
                self.rules.inside(question, info.call_key) as inner,
                executing(info.kind, info.name, info.call_key),
            ):
                outcome = await make(info)
                return outcome, max(
                    0, getattr(inner, "model_calls", 0) - question.ordinal - _counts(question)
                )
        except asyncio.CancelledError:
            if self._latch.reason is not None:
                raise RunLatched(self._latch.reason) from None
            cancelled = self._new_record(question, info, {"cancelled": True}, began_s)
            await self._store_unbroken(cancelled, [])
            raise
        except Exception as error:  # noqa: BLE001 - what is not recorded must not reach the pattern
            return Outcome(error=coded(error, PatternError), may_retry=False), 0
        finally:
            self.rules.ended()
            current_call.reset(token)

    @contextmanager
    def _counted_as_running(self, may_repeat: bool) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        running = _Running(task, _running.get(), may_repeat=may_repeat)
        token = _running.set(running)
        self._running.add(running)
        self._nothing_runs.clear()
        try:
            yield
        finally:
            _running.reset(token)
            self._running.discard(running)
            self._look_whether_quiet()

    @contextmanager
    def _blocking_outer_calls(self) -> Iterator[None]:
        """The calls inside which this one stops cannot end by themselves: nobody waits for them."""
        outer = []
        running = _running.get()
        while running is not None:
            running.blocked += 1
            outer.append(running)
            running = running.outer
        self._look_whether_quiet()
        try:
            yield
        finally:
            for running in outer:
                running.blocked -= 1

    def _look_whether_quiet(self) -> None:
        if not self._running or all(running.blocked for running in self._running):
            self._nothing_runs.set()

    def _is_to_be_retried(self, outcome: Outcome, info: CallInfo) -> bool:
        error = outcome.error
        if error is None or not error.retryable or not outcome.may_retry or not self._durable:
            return False
        # A prompt that differs in every attempt has new tries each time; the run's own count bounds it.
        in_flight = max(1, sum(not running.blocked for running in self._running))
        if info.failed_tries < self._max_tries and self._retries < self._max_tries * in_flight:
            return True
        self._note_exhausted(error, info.failed_tries)
        return False

    def _note_exhausted(self, error: OpenAgentsError, failed_tries: int) -> None:
        self._ledger.note(
            "run.resume_exhausted",
            {
                "run_id": self.run_id,
                "attempt_index": failed_tries + 1,
                "error_type": type(error).__name__,
                "error_code": error.code,
                "limit": self._max_tries,
            },
        )

    def put_off(self, error: OpenAgentsError, part: str) -> bool:
        """Put the run off because of an error of a part of the pattern; whether that may be.

        Calls that run are cancelled and not recorded: they are made again. One whose effects must not be
        repeated forbids it.
        """
        if self._latch.reason is not None and not self._latch.lets_calls_end:
            return True  # it stops already
        may_repeat = all(running.may_repeat for running in self._running)
        if not (error.retryable and self._durable and may_repeat):
            return False
        failed_tries = self._tries.get(part, 0)
        if failed_tries >= self._max_tries:
            self._note_exhausted(error, failed_tries)
            return False
        self._latch.set(LatchReason.RETRY, error=error, call=part)
        self._latch.hurry()
        return True

    # --- records -----------------------------------------------------------------------------------------

    def _record(
        self, question: Question, info: CallInfo, outcome: Outcome, began_s: float, model_calls: int
    ) -> tuple[Record, str]:
        """The record of an outcome, and its JSON; what is too large or not JSON is itself an outcome."""
        usage = {k: v for k, v in outcome.usage.model_dump().items() if v not in (0, None, {})}
        more: dict[str, Any] = {"usage": usage, "model_calls": model_calls}
        call = f"{info.kind} {info.name}"
        try:
            if outcome.error is None:
                result = {"ok": replaced(outcome.value, _levels(info.kind))}
            else:
                result = {"error": replaced(outcome.error.to_dict(), MAX_NESTING + ENVELOPE_LEVELS)}
            changed: dict[str, Any] = {
                "state": replaced(outcome.state, _levels(info.kind) + CHANGE_LEVELS),
                "artifacts": replaced(outcome.artifacts, MAX_NESTING + ENVELOPE_LEVELS),
            }
            record = self._new_record(question, info, result, began_s, **changed, **more)
            text = record.to_json()
            size = len(text.encode())
            if size > self.max_record_bytes and outcome.error is not None:
                # What the error says is worth more than that it said too much.
                result["error"]["context"].pop("traceback", None)
                result["error"]["message"] = result["error"]["message"][:SHORT_MESSAGE_CHARS]
                record = self._new_record(question, info, result, began_s, **changed, **more)
                text = record.to_json()
                size = len(text.encode())
            if size <= self.max_record_bytes:
                return record, text
            problem = f"the outcome of {call} has {size:,} bytes, {self.max_record_bytes:,} are allowed"
            not_stored: OpenAgentsError = StepTooLarge(
                problem, hint="return less, or a reference to where the whole is"
            )
        except NestedTooDeeply as error:
            not_stored = too_deep(f"the outcome of {call}", error)
        except (TypeError, ValueError, RecursionError) as error:
            not_stored = StepTooLarge(
                f"the outcome of {call} is not JSON: {error}", hint="return plain JSON values"
            )
        not_stored.run_id = self.run_id
        record = self._new_record(question, info, {"error": not_stored.to_dict()}, began_s, **more)
        return record, record.to_json()

    def _new_record(
        self, question: Question, info: CallInfo, outcome: dict[str, Any], began_s: float, **more: Any
    ) -> Record:
        return Record(
            info.call_key,
            info.kind,
            info.name,
            outcome,
            life=self._life,
            took_ms=took_ms if (took_ms := round((self._loop.time() - began_s) * 1000)) > NO_TIME_MS else 0,
            v=self.rules.format,
            **self.rules.identity(question),
            **more,
        )

    def _told_cancelled(self, record: Record) -> Record:
        """For later attempts: the call was recorded, but the program was told that it was cancelled."""
        outcome = {"cancelled": True}
        return Record(
            f"{record.call}!", "cancelled", record.name, outcome, life=self._life, v=self.rules.format
        )

    def begin_journal(self, start: Record) -> None:
        """The start of the run, checkpoint 0: the journal begins with it, before all other records."""
        self._start = start

    def start_is_prepared(self) -> None:
        """The start is complete: it is stored together with what is written next."""
        if self._start is not None:
            start, self._start = self._start, None
            _, saved = self._next_checkpoint(start)
            self._ledger.begin(start.to_json(), saved)

    async def _commit(self, record: Record, text: str, events: list[Event]) -> None:
        """Store a record, whatever becomes of the task that made the call."""
        try:
            await self._store_unbroken(record, events, text)
            await self.rules.after_stored(record.took_ms)
        except asyncio.CancelledError:
            if self._latch.reason is None:
                # It is stored, but the program is told that it was cancelled: replay must tell it the same.
                await self._store_unbroken(self._told_cancelled(record), [])
            raise

    async def _store_unbroken(self, record: Record, events: list[Event], text: str = "") -> None:
        """Store to the end; a cancellation that comes meanwhile is raised after it."""
        storing = outside_runs(self._store(record, events, text), name=f"commit {self.run_id} {record.call}")
        try:
            await asyncio.shield(storing)
        except asyncio.CancelledError:
            await asyncio.wait([storing])
            storing.result()
            raise

    async def _store(self, record: Record, events: list[Event], text: str) -> None:
        self.start_is_prepared()
        self._ledger.end_deltas(record.call)
        usage = self.usage.plus(RunUsage(**record.usage)) if record.usage else self.usage
        if record.usage:
            events = [*events, ("usage.updated", {"usage": usage.model_dump(exclude_defaults=True)})]
        if not self._durable:
            self.usage = usage
            for event in events:
                self._ledger.note(*event)
            return
        position, saved = self._next_checkpoint(record)
        self.usage = usage
        await self._ledger.commit(position, text or record.to_json(), usage, [*events, saved])

    # --- checks of the run's output ----------------------------------------------------------------------

    def check_of_output(self, key: str) -> dict[str, Any] | None:
        """What the check of this output gave in this attempt or an earlier one; None when it is to be made.
        `key` is a digest of the output."""
        return self._checks.get(key)

    def record_check(self, key: str, outcome: dict[str, Any]) -> None:
        """Note what a check gave. What follows from it is stored after it; it costs no round trip."""
        self._checks[key] = outcome
        if not self._durable or self.rules.format == BY_PLACE:
            return
        self.start_is_prepared()
        record = check_record(key, outcome, life=self._life)
        position, saved = self._next_checkpoint(record)
        self._ledger.add(position, record.to_json(), self.usage, saved)

    def _next_checkpoint(self, record: Record) -> tuple[int, Event]:
        """Give the record its place; with it the event that tells of the checkpoint."""
        position, self.position = self.position, self.position + 1
        told = {
            "checkpoint_id": f"{self.run_id}:step:{position}",
            "step_index": position,
            "transcript_length": self._transcript_length,
            "call_id": record.call,
        }
        return position, ("run.checkpoint_saved", told)

    # --- replay ------------------------------------------------------------------------------------------

    def mismatch(self, problem: str) -> ReplayMismatch:
        """The program went another way than it did before; nothing may be executed any more."""
        kind, hint = ReplayMismatch, "chance and time must come from recorded calls; was the pattern changed?"
        if self._definition_changed:
            kind, hint = DefinitionChanged, "submit the run anew, or bring the agent's old definition back"
        error = kind(problem, hint=hint, run_id=self.run_id)
        self.verdict = self.verdict or error
        return error

    async def _replay(self, record: Record) -> Any:
        for inner in self.rules.inside_of(record):
            self.usage = self.usage.plus(RunUsage(**inner.usage))
            self._on_record(inner)
        self.usage = self.usage.plus(RunUsage(**record.usage))
        if self.rules.is_read:
            for branch in list(self._held):
                self._release_held(branch)
        await self._stop_if_latched()
        return self._apply(record)

    def _apply(self, record: Record, made: OpenAgentsError | None = None) -> Any:
        """Give the outcome that the record holds. `made` is the error from which it was recorded just now."""
        self._on_record(record)
        if "error" in record.outcome:
            error = error_from_wire(record.outcome["error"])
            if made is not None and made.code == error.code:
                stand_for(error, original_of(made))
            if isinstance(error, BudgetExhausted | MaxStepsExceeded):
                self.verdict = error  # no pattern talks itself out of a budget
            raise error
        return record.outcome.get("ok")

    # --- events of the pattern ---------------------------------------------------------------------------

    def say(self, name: str, payload: Mapping[str, Any]) -> None:
        """An event of the pattern. While its branch is replayed it is held back: it was said before.

        Raises `StepTooLarge`, in each attempt.
        """
        if self.rules.is_read or self.rules.is_inside_a_call():
            self._note_said(name, payload)
        else:
            self._ledger.check_event(name, payload)
            self._held[self.rules.branch()].append((name, payload))

    async def emit(self, name: str, payload: Mapping[str, Any]) -> None:
        """As `say`, and wait where Redis has not taken the events before: a program that only emits must not
        fill the worker's memory."""
        self.say(name, payload)
        if self._ledger.is_full:
            await self._ledger.room()
            await self._stop_if_latched()

    def _release_held(self, branch: str) -> None:
        for event in self._held.pop(branch, ()):
            self._note_said(*event)

    def _note_said(self, name: str, payload: Mapping[str, Any]) -> None:
        self._ledger.emit(name, payload)
        if name == "tool.failed":  # the model asked for a tool that there is not, for example
            said: dict[str, Any] = {
                key: payload[key] for key in ("tool_id", "code", "message") if key in payload
            }
            log.warning("tool.failed", run_id=self.run_id, **said)

    # --- the end of the attempt --------------------------------------------------------------------------

    async def _stop_if_latched(self) -> None:
        """Where a latched run stops. While other calls may still end, this one waits, so that the program
        sees nothing and cancels nobody; then it raises the latch."""
        if self._latch.reason is None:
            return
        if self._latch.lets_calls_end:
            with self._blocking_outer_calls():
                await self._stopping.wait()
        raise RunLatched(self._latch.reason)

    async def quiet(self) -> None:
        """Returns when no call is being made that may still end."""
        await self._nothing_runs.wait()

    def stop(self) -> None:
        """Nothing is waited for any more: calls that run are cancelled, calls that wait raise the latch."""
        self._stopping.set()
        for running in list(self._running):
            running.task.cancel()

    async def check_all_read(self, part: str = "") -> None:
        """Called when a part of the run has ended: records that nobody asked for are a mismatch."""
        unread = await self.rules.unread_at_end(part)
        if unread and self._latch.reason is None:
            raise self.mismatch(
                f"the program ended without asking for {', '.join(unread[:3])}, which the journal holds"
            )


def _levels(kind: str) -> int:
    """Of lists and objects in what a call gives. A reply of a model and the view of a memory have arguments
    and results of tools in them, which may have all levels themselves."""
    return MAX_NESTING if kind == "tool" else MAX_NESTING + ENVELOPE_LEVELS


def _counts(question: Question) -> int:
    return 1 if question.kind in ("model", "http") else 0
