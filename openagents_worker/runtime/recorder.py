"""The recorder: every call of a model or a tool is answered here, from the journal or made and recorded.

Whatever crosses this border back into the pattern has been recorded first, value or exception; what is not
recorded never reaches the pattern.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
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
from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.models import RunUsage
from openagents_worker.runtime.journal import Journal, Record
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.ledger import Ledger
from openagents_worker.runtime.place import Places
from openagents_worker.runtime.user_code import coded

__all__ = ["Outcome", "Recorder"]

Event = tuple[str, Mapping[str, Any]]


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


class Recorder:
    """The recorded calls of one attempt."""

    def __init__(
        self,
        *,
        run_id: str,
        uid: str,
        journal: Journal,
        ledger: Ledger,
        latch: Latch,
        tries: Mapping[str, int],
        max_tries: int,
        life: int,
        durable: bool,
        max_record_bytes: int,
        definition_changed: bool,
        transcript_length: int,
        on_record: Callable[[Record], None],
    ) -> None:
        self.run_id = run_id
        self.usage = RunUsage()
        self.position = journal.length
        self.verdict: OpenAgentsError | None = None
        """An error that ends the run whatever the pattern makes of it: a budget, a mismatch."""
        self._uid = uid
        self._journal = journal
        self._ledger = ledger
        self._latch = latch
        self._tries = tries
        self._max_tries = max_tries
        self._life = life
        self._durable = durable
        self._max_record_bytes = max_record_bytes
        self._definition_changed = definition_changed
        self._transcript_length = transcript_length
        self._on_record = on_record
        self._places = Places()
        self._entered: Counter[str] = Counter()
        self._running: Counter[asyncio.Task[Any]] = Counter()
        self._stopping = asyncio.Event()
        self._nothing_runs = asyncio.Event()
        self._nothing_runs.set()
        self._held: defaultdict[str, list[Event]] = defaultdict(list)

    # --- calls -------------------------------------------------------------------------------------------

    async def call(
        self,
        kind: str,
        name: str,
        digest: str,
        make: Callable[[CallInfo], Awaitable[Outcome]],
        *,
        strict: bool = True,
    ) -> Any:
        """Answer a call from the journal, or make it, record it and then answer.

        `strict`: a recorded call with another digest is an error; otherwise it is an event.
        """
        key = self._places.enter()
        info = self._info(kind, name, key)
        await self._stop_if_latched()
        record = self._journal.take(key)
        if record is not None:
            self._same_call(record, kind, name, digest, strict)
            self._held.pop(self._places.branch(), None)  # said before this record was stored
            return await self._replay(record)
        self._release_held(self._places.branch())
        return await self._make(key, kind, name, digest, make, info)

    def begin(self, path: str = "") -> None:
        """The task that runs now makes the run's calls; `path` sets those of another part apart."""
        self._places.begin(path)

    def end(self) -> None:
        """The task that runs now makes no more of the run's calls."""
        self._places.end()

    def _info(self, kind: str, name: str, key: str) -> CallInfo:
        self._entered[kind] += 1
        return CallInfo(
            run_id=self.run_id,
            call_key=key,
            idempotency_key=f"{self.run_id}:{self._uid}:{key}",
            ordinal=self._entered[kind] - 1,
            failed_tries=self._tries.get(key, 0),
            kind=kind,
            name=name,
        )

    async def _make(
        self,
        key: str,
        kind: str,
        name: str,
        digest: str,
        make: Callable[[CallInfo], Awaitable[Outcome]],
        info: CallInfo,
    ) -> Any:
        with self._counted_as_running():
            outcome = await self._outcome(key, kind, name, digest, make, info)
            record = None
            if self._is_to_be_retried(outcome, info):
                self._latch.set(LatchReason.RETRY, error=outcome.error, call=key)
                for event in outcome.events:
                    self._ledger.note(*event)
            else:
                record = self._record(key, kind, name, digest, outcome)
                await self._commit(record, outcome.events)
        await self._stop_if_latched()  # it is stored; a run that is to stop stops before the pattern goes on
        assert record is not None
        return self._apply(record)

    async def _outcome(
        self,
        key: str,
        kind: str,
        name: str,
        digest: str,
        make: Callable[[CallInfo], Awaitable[Outcome]],
        info: CallInfo,
    ) -> Outcome:
        token = current_call.set(info)
        try:
            with self._places.inside(key):
                return await make(info)
        except asyncio.CancelledError:
            if self._latch.reason is not None:
                raise RunLatched(self._latch.reason) from None
            await self._store_unbroken(
                Record(key, kind, name, digest, {"cancelled": True}, life=self._life), []
            )
            raise
        except Exception as error:  # noqa: BLE001 - what is not recorded must not reach the pattern
            return Outcome(error=coded(error, PatternError), may_retry=False)
        finally:
            current_call.reset(token)

    @contextmanager
    def _counted_as_running(self) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._running[task] += 1
        self._nothing_runs.clear()
        try:
            yield
        finally:
            self._running[task] -= 1
            if self._running[task] == 0:
                del self._running[task]
            if not self._running:
                self._nothing_runs.set()

    def _is_to_be_retried(self, outcome: Outcome, info: CallInfo) -> bool:
        error = outcome.error
        if error is None or not error.retryable or not outcome.may_retry or not self._durable:
            return False
        if info.failed_tries < self._max_tries:
            return True
        self._ledger.note(
            "run.resume_exhausted",
            {
                "run_id": self.run_id,
                "attempt_index": info.failed_tries + 1,
                "error_type": type(error).__name__,
                "error_code": error.code,
                "limit": self._max_tries,
            },
        )
        return False

    # --- records -----------------------------------------------------------------------------------------

    def _record(self, key: str, kind: str, name: str, digest: str, outcome: Outcome) -> Record:
        """The record of an outcome; what is too large or not JSON is itself an outcome."""
        result = {"error": outcome.error.to_dict()} if outcome.error is not None else {"ok": outcome.value}
        usage = {k: v for k, v in outcome.usage.model_dump().items() if v not in (0, None, {})}
        record = Record(key, kind, name, digest, result, usage, outcome.state, outcome.artifacts, self._life)
        try:
            size = len(record.to_json().encode())
            if size <= self._max_record_bytes:
                return record
            problem = (
                f"the outcome of {kind} {name} has {size:,} bytes, {self._max_record_bytes:,} are allowed"
            )
            hint = "return less, or a reference to where the whole is"
        except (TypeError, ValueError, RecursionError) as error:
            problem, hint = f"the outcome of {kind} {name} is not JSON: {error}", "return plain JSON values"
        too_large = StepTooLarge(problem, hint=hint, run_id=self.run_id)
        return Record(key, kind, name, digest, {"error": too_large.to_dict()}, usage, life=self._life)

    async def prepare(self, record: Record, *, at_once: bool) -> None:
        """Record the prepared start: checkpoint 0. What was noted so far is stored with it.

        `at_once`: another attempt might prepare it otherwise, so nothing may come of it before it is stored.
        Else it travels with what is written next.
        """
        if at_once:
            await self._commit(record, [])
        else:
            _, saved = self._next_checkpoint(record)
            self._ledger.begin(record.to_json(), saved)

    async def _commit(self, record: Record, events: list[Event]) -> None:
        """Store a record, whatever becomes of the task that made the call."""
        try:
            await self._store_unbroken(record, events)
        except asyncio.CancelledError:
            if self._latch.reason is None:
                # It is stored, but the pattern is told that it was cancelled: replay must tell it the same.
                after = Record(
                    f"{record.call}!", "cancelled", record.name, record.digest, {"cancelled": True}
                )
                await self._store_unbroken(after, [])
            raise

    async def _store_unbroken(self, record: Record, events: list[Event]) -> None:
        """Store to the end; a cancellation that comes meanwhile is raised after it."""
        storing = asyncio.create_task(self._store(record, events), name=f"commit {self.run_id} {record.call}")
        try:
            await asyncio.shield(storing)
        except asyncio.CancelledError:
            await asyncio.wait([storing])
            storing.result()
            raise

    async def _store(self, record: Record, events: list[Event]) -> None:
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
        await self._ledger.commit(position, record.to_json(), usage, [*events, saved])

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

    def _same_call(self, record: Record, kind: str, name: str, digest: str, strict: bool) -> None:
        if (record.kind, record.name) == (kind, name) and (record.digest == digest or not strict):
            if record.digest != digest:
                self._ledger.note("replay.prompt_changed", {"call_id": record.call, "model": name})
            return
        raise self.mismatch(
            f"at call {record.call} the journal holds {record.kind} {record.name}, "
            f"the program asks for {kind} {name}"
            + ("" if (record.kind, record.name) != (kind, name) else " with other arguments")
        )

    def mismatch(self, problem: str) -> ReplayMismatch:
        """The program went another way than it did before; nothing may be executed any more."""
        kind, hint = ReplayMismatch, "chance and time must come from recorded calls; was the pattern changed?"
        if self._definition_changed:
            kind, hint = DefinitionChanged, "submit the run anew, or bring the agent's old definition back"
        error = kind(problem, hint=hint, run_id=self.run_id)
        self.verdict = self.verdict or error
        return error

    async def _replay(self, record: Record) -> Any:
        self.usage = self.usage.plus(RunUsage(**record.usage))
        cancelled_after = self._journal.take(f"{record.call}!")
        if self._journal.is_read:
            for branch in list(self._held):
                self._release_held(branch)
        if "cancelled" in record.outcome or cancelled_after is not None:
            await self._latch.wait()  # the pattern cancelled this call then, and will again
            await self._stop_if_latched()
        return self._apply(record)

    def _apply(self, record: Record) -> Any:
        self._on_record(record)
        if "error" in record.outcome:
            error = error_from_wire(record.outcome["error"])
            if isinstance(error, BudgetExhausted | MaxStepsExceeded):
                self.verdict = error  # no pattern talks itself out of a budget
            raise error
        return record.outcome.get("ok")

    @property
    def is_replaying(self) -> bool:
        return not self._journal.is_read

    # --- events of the pattern ---------------------------------------------------------------------------

    def say(self, name: str, payload: Mapping[str, Any]) -> None:
        """An event of the pattern. While its branch is replayed it is held back: it was said before."""
        branch = self._places.branch()
        if self._journal.is_read or ">" in branch:
            self._ledger.note(name, payload)
        else:
            self._held[branch].append((name, payload))

    def _release_held(self, branch: str) -> None:
        for event in self._held.pop(branch, ()):
            self._ledger.note(*event)

    # --- the end of the attempt --------------------------------------------------------------------------

    async def _stop_if_latched(self) -> None:
        """Where a latched run stops. While other calls may still end, this one waits, so that the pattern
        sees nothing and cancels nobody; then it raises the latch."""
        if self._latch.reason is None:
            return
        if self._latch.lets_calls_end:
            await self._stopping.wait()
        raise RunLatched(self._latch.reason)

    async def quiet(self) -> None:
        """Returns when no call is being made."""
        await self._nothing_runs.wait()

    def stop(self) -> None:
        """Nothing is waited for any more: calls that run are cancelled, calls that wait raise the latch."""
        self._stopping.set()
        for task in list(self._running):
            task.cancel()

    def check_all_read(self) -> None:
        """Called when the pattern has ended: records that nobody asked for are a mismatch."""
        unread = self._journal.unread()
        if unread:
            raise self.mismatch(
                f"the program ended without asking for {', '.join(unread[:3])}, which the journal holds"
            )
