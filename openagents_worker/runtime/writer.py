"""The run writer: the only place that decides what an attempt writes to Redis, and in which order.

Events are batched for a few milliseconds and are stored with the next commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from openagents_worker.jsontext import dumps
from openagents_worker.llm.base import Delta, DeltaKind
from openagents_worker.models import RunUsage
from openagents_worker.models.usage import NO_USAGE
from openagents_worker.redaction import shown_json
from openagents_worker.runtime.call_ids import outside_runs
from openagents_worker.runtime.event_text import EventText, masked_name
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.reply_stream import ReplyStream
from openagents_worker.runtime.services import Services
from openagents_worker.store import scripts
from openagents_worker.store.facts import Fact
from openagents_worker.store.formats import PARKS, WRITTEN
from openagents_worker.store.parking import Park
from openagents_worker.store.scripts import ScriptCall, SuspendKind, WriteResult

__all__ = ["RunWriter"]

FLUSH_S = 0.02  # events are collected for this long: one round trip per step instead of three
BATCH_EVENTS = 250  # per script: Redis needs 10 microseconds per event and serves no other client meanwhile
BATCH_BYTES = 256 * 1024
PENDING_EVENTS = 1_000  # when more events wait for Redis, `wait_for_space` blocks
PENDING_BYTES = 4 * 1024 * 1024


_Event = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class _DeferredRecord:
    """A record that is stored with the next write, with the events that announce it."""

    position: int
    record: str
    usage: RunUsage
    events: Sequence[_Event]


_reports: set[asyncio.Task[None]] = set()
"""The reports that are being sent. The event loop holds only weak references to tasks."""


class RunWriter:
    """Writes the records, events and state changes of one attempt, each with the fence of its claim."""

    def __init__(
        self, identity: RunIdentity, services: Services, *, store: FencedStore, latch: Latch, length: int = 0
    ) -> None:
        """`length` is the number of records in the journal."""
        self.store = store
        self.run_id = identity.run_id
        self.fence = identity.fence
        self._attempt = identity.attempt
        self._latch = latch
        self._ids = shown_json(identity.ids)
        self._text = EventText(identity.run_id, services)
        self._write_lock = asyncio.Lock()
        self._pending: list[str] = []  # name, payload, name, payload …
        self._pending_chars = 0
        self._batch_no = 0
        self._length = length
        self._deferred: list[_DeferredRecord] = []
        self.format = WRITTEN
        """The format of the records of this run. A worker that cannot read it skips the run."""
        self.facts_at_suspend: dict[str, Fact] = {}
        """Facts, by name, that are stored when the run is suspended, whatever the reason: its open waits."""
        self.closed_at_park: set[str] = set()
        """Names of facts that are deleted when the run is parked: what they say begins again afterwards."""
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: set[asyncio.Task[None]] = set()
        self._is_flush_due = False
        self._is_timer_late = False
        self._deltas: dict[str, ReplyStream] = {}
        self._pace = services.reply_pace
        self._loop = asyncio.get_running_loop()

    # --- events ------------------------------------------------------------------------------------------

    def emit(self, name: str, payload: Mapping[str, Any]) -> None:
        """Queue an event. It is stored with the next commit, or after `FLUSH_S` seconds without one."""
        self._add(masked_name(name), self._text.payload(payload))

    def emit_user_event(self, name: str, payload: Mapping[str, Any]) -> None:
        """Queue an event of user code, as `emit` does. Raises `StepTooLarge`."""
        self._add(*self._text.checked(name, payload))

    def check_event(self, name: str, payload: Mapping[str, Any]) -> None:
        """Raises `StepTooLarge` for an event that `emit_user_event` would refuse."""
        self._text.checked(name, payload)

    def _add(self, name: str, payload: str) -> None:
        self._append(name, payload)
        if self._timer is None or self._is_timer_late:
            self._schedule(FLUSH_S)

    def _append(self, name: str, payload: str) -> None:
        """Queue an event that the caller stores at once."""
        self._pending += (name, payload)
        self._pending_chars += len(payload)

    @property
    def is_full(self) -> bool:
        """Whether too many events wait for Redis: call `wait_for_space` before the next one."""
        return len(self._pending) > 2 * PENDING_EVENTS or self._pending_chars > PENDING_BYTES

    async def wait_for_space(self) -> None:
        """Return when another event can be queued, or when the run is fenced and nothing can be written."""
        while self.is_full and self._latch.reason is not LatchReason.FENCED:
            await asyncio.wait([self._begin_flush()])

    def emit_run_event(self, name: str, **payload: Any) -> None:
        """Queue an event of the runtime. Its payload begins with the ids of run, session and agent."""
        self._add(name, self._of_run(payload))

    def emit_run_events(self, names: Sequence[str], **payload: Any) -> None:
        """Queue several events with the same payload, as `emit_run_event` does."""
        text = self._of_run(payload)
        for name in names:
            self._add(name, text)

    def _of_run(self, payload: Mapping[str, Any]) -> str:
        more = self._text.payload(payload) if payload else "{}"
        return self._ids if more == "{}" else f"{self._ids[:-1]},{more[1:]}"

    def preview(self, content: Any) -> Any:
        """The masked and shortened content of a call, for an event. The journal holds the whole content."""
        return self._text.preview(content)

    def delta(self, call: str, text: str) -> None:
        """Publish a piece of a streamed reply to current watchers. It is not stored."""
        self.delta_of(call, Delta(DeltaKind.TEXT, text))

    def delta_of(self, call: str, piece: Delta) -> None:
        """Publish a piece of the text, of the reasoning or of the tool arguments of a reply."""
        stream = self._deltas.get(call)
        if stream is None:
            stream = self._deltas[call] = ReplyStream()
            self._pace.begin()
        stream.add(piece)
        if self._timer is None:
            self._schedule(self._pace.interval_s)

    def end_deltas(self, call: str) -> None:
        """Queue the unsent rest of a streamed reply, so that it is published before the event of the call."""
        stream = self._deltas.pop(call, None)
        if stream is None:
            return
        self._pace.end()
        for text in stream.take(call, self._attempt):
            self._add("llm.delta", text)

    def _schedule(self, delay_s: float) -> None:
        """Flush after `delay_s`, or earlier if an earlier flush is scheduled."""
        if self._timer is not None:
            if not self._is_timer_late:
                return
            self._timer.cancel()
        self._is_timer_late = delay_s > FLUSH_S
        self._timer = self._loop.call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if (
            not self._pending
            and not self._deferred
            and not any(stream.has_unsent for stream in self._deltas.values())
        ):
            return  # a commit has stored everything meanwhile
        if self._flushing:
            self._is_flush_due = True  # what waits until Redis has answered is sent together
        else:
            self._begin_flush()

    def _begin_flush(self) -> asyncio.Task[None]:
        self._is_flush_due = False
        task = outside_runs(self._flush_quietly(), name=f"flush {self.run_id}")
        self._flushing.add(task)
        task.add_done_callback(self._end_flush)
        return task

    def _end_flush(self, task: asyncio.Task[None]) -> None:
        self._flushing.discard(task)
        if self._is_flush_due and not self._flushing:
            self._begin_flush()

    async def _flush_quietly(self) -> None:
        """Flush in a task of the writer. No caller awaits it, so `RunLatched` is not raised."""
        with suppress(RunLatched):  # the latch is set; the next recorded call raises it
            await self.flush()

    async def flush(self) -> None:
        """Store the queued events and deferred records, and publish queued pieces of replies."""
        async with self._write_lock:
            await self._store_full_batches()
            await self._store_batch(self._take_batch())

    async def _store_full_batches(self) -> None:
        """Store all queued events except the last batch. The caller must hold the write lock.

        The last batch is left for the caller, which stores it together with its own write.
        """
        for call, stream in self._deltas.items():
            for text in stream.take(call, self._attempt):
                self._append("llm.delta", text)
        while (length := self._batch_length()) < len(self._pending):
            batch, self._pending = self._pending[:length], self._pending[length:]
            self._pending_chars -= sum(map(len, batch[1::2]))
            self._batch_no += 1
            await self._store_batch(batch)

    def _batch_length(self) -> int:
        """How many items of `_pending` make one batch: an even number, at least one event."""
        length = min(len(self._pending), 2 * BATCH_EVENTS)
        if self._pending_chars <= BATCH_BYTES:
            return length
        size = 0
        for at in range(1, length, 2):
            size += len(self._pending[at])
            if size > BATCH_BYTES and at > 1:
                return at - 1
        return length

    async def _store_batch(self, batch: list[str]) -> None:
        if deferred := self._take_deferred():
            await self._commit(0, [], deferred[-1].usage, batch, deferred)
        elif batch:
            await self.store.write(
                scripts.emit(run_id=self.run_id, fence=self.fence, batch_no=self._batch_no, events=batch)
            )

    def _take_batch(self, events: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> list[str]:
        """Take all queued events and append these. The result is one batch with a new batch number."""
        batch, self._pending, self._pending_chars = self._pending, [], 0
        for name, payload in events:
            batch += [name, self._text.payload(payload)]
        self._batch_no += 1
        return batch

    # --- fenced writes -----------------------------------------------------------------------------------

    def defer_start(self, record: str, event: _Event) -> None:
        """Queue record 0, to be stored with the next write. `event` announces its checkpoint."""
        self._deferred.append(_DeferredRecord(0, record, NO_USAGE, ()))
        self.emit(*event)

    def defer_record(self, position: int, record: str, usage: RunUsage, event: _Event) -> None:
        """Queue record number `position`, to be stored with the next write or after `FLUSH_S` seconds.

        It is dropped when the run ends first: no later attempt needs it.
        """
        self._deferred.append(_DeferredRecord(position, record, usage, (event,)))
        self._schedule(FLUSH_S)

    async def commit(
        self,
        position: int,
        record: str,
        usage: RunUsage,
        events: Sequence[tuple[str, Mapping[str, Any]]],
        *,
        taken: Sequence[str] = (),
    ) -> None:
        """Store record number `position`, together with all queued events and records. `taken`: the names of
        the facts that the record replaces."""
        async with self._write_lock:
            await self._store_full_batches()
            await self._commit(
                position, [record], usage, self._take_batch(events), self._take_deferred(position), taken
            )

    async def take_facts(self, names: Sequence[str]) -> None:
        """Delete facts that a run without records has received."""
        await self._write_facts(taken=names)

    async def write_fact(self, fact: Fact) -> None:
        """Store a fact ahead of the record that will replace it, after all queued events."""
        await self._write_facts(facts=[fact.name, fact.text])

    async def _write_facts(self, **facts: Sequence[str]) -> None:
        async with self._write_lock:
            await self._store_full_batches()
            batch = self._take_batch()
            await self.store.write(
                scripts.emit(
                    run_id=self.run_id,
                    fence=self.fence,
                    batch_no=self._batch_no,
                    events=batch,
                    **facts,
                )
            )

    async def write_intent(
        self, call: str, intent: str, knows_decision: bool, taken: Sequence[str] = ()
    ) -> str:
        """Store the intent of a call with effects, after all queued events and records.

        Returns '', or a decision (JSON) about an earlier intent of the call: then it is not stored. With
        `OPENAGENTS_DURABILITY=strict` it is on disk when this returns.
        """
        if self._deferred:
            await self.flush()
        async with self._write_lock:
            await self._store_full_batches()
            batch = self._take_batch()
            begun = await self.store.write_ahead(
                scripts.intent(
                    run_id=self.run_id,
                    fence=self.fence,
                    call=call,
                    value=intent,
                    knows_decision=knows_decision,
                    batch_no=self._batch_no,
                    events=batch,
                    taken=taken,
                )
            )
            return begun.decision

    async def ask(self, call: str, question: str) -> None:
        """Store what is asked about a call (JSON), after all queued events."""
        if self._deferred:
            await self.flush()
        async with self._write_lock:
            await self._store_full_batches()
            batch = self._take_batch()
            await self.store.write(
                scripts.ask(
                    run_id=self.run_id,
                    fence=self.fence,
                    call=call,
                    value=question,
                    batch_no=self._batch_no,
                    events=batch,
                )
            )

    async def decide_approval(self, call: str, event: str, decision: Mapping[str, Any]) -> str:
        """Decide about the approval of a call. Returns the first decision (JSON), '' if it is this one."""
        return await self.store.decide(
            scripts.decide(
                run_id=self.run_id,
                kind=scripts.DecisionKind.APPROVAL,
                call=call,
                value=dumps(decision),
                event=event,
                payload=self._text.payload(decision),
            )
        )

    def shown(self, content: Any) -> Any:
        """The masked content of a call for a person who decides about it. It is not shortened."""
        return self._text.shown(content)

    def report(self, call: ScriptCall[scripts.DecideResult], call_id: str) -> None:
        """Report the outcome of a call to the next owner of the run.

        The attempt does not wait for it: its worker has lost the run, and must stop in time.
        """
        task = outside_runs(self.store.report(call, call_id), name=f"report {self.run_id}")
        _reports.add(task)
        task.add_done_callback(_reports.discard)

    def _take_deferred(self, before: int | None = None) -> list[_DeferredRecord]:
        """Take the deferred records that can be stored now: those before position `before`.

        Without `before`: those that directly follow the stored journal.
        """
        if not self._deferred:
            return []
        if before is None:
            before = self._length
            for record in self._deferred:
                before += record.position == before
        taken = [record for record in self._deferred if record.position < before]
        self._deferred = self._deferred[len(taken) :]
        return taken

    async def _commit(
        self,
        position: int,
        records: list[str],
        usage: RunUsage,
        batch: list[str],
        deferred: Sequence[_DeferredRecord],
        taken: Sequence[str] = (),
    ) -> None:
        """Write records and events with one script call. `deferred` records come first."""
        if deferred:
            position = deferred[0].position
            records = [*(each.record for each in deferred), *records]
            checkpoint_events = [
                (name, self._text.payload(payload)) for each in deferred for name, payload in each.events
            ]
            batch = [*chain.from_iterable(checkpoint_events), *batch]
        await self.store.write(
            scripts.commit(
                run_id=self.run_id,
                fence=self.fence,
                position=position,
                records=records,
                usage=usage.model_dump_json(),
                batch_no=self._batch_no,
                events=batch,
                format=self.format,
                taken=taken,
            )
        )
        self._length = position + len(records)

    async def suspend(
        self,
        *,
        kind: SuspendKind,
        delay_ms: int,
        call: str,
        error_code: str,
        left_max_ms: int = 0,
        error_details: str = "",
        park: Park | None = None,
    ) -> WriteResult:
        """Suspend the run. Raises `RunLatched` when another worker owns it. On any answer but OK it is not
        suspended. `park` says how a run is parked."""
        if self._deferred:
            await self.flush()
        facts = chain.from_iterable((fact.name, fact.text) for fact in self.facts_at_suspend.values())
        async with self._write_lock:
            await self._store_full_batches()
            batch = self._take_batch()
            return await self.store.write_last(
                scripts.suspend(
                    run_id=self.run_id,
                    fence=self.fence,
                    kind=kind,
                    delay_ms=delay_ms,
                    call=call,
                    error_code=error_code,
                    batch_no=self._batch_no,
                    events=batch,
                    left_max_ms=left_max_ms,
                    error_details=error_details,
                    facts=list(facts),
                    **({} if park is None else self._parked(park)),
                )
            )

    def _parked(self, park: Park) -> dict[str, Any]:
        """The arguments of the script `suspend` for a run that is parked."""
        return {
            "park_state": park.state,
            "waits": park.waits_text,
            "waiting_payload": park.event_payload,
            "due_ms": park.due_ms,
            "closed": sorted(self.closed_at_park),
            "facts_seen": park.facts_seen,
            "limit": park.limit,
            "tenant": park.tenant,
            "format": PARKS,
        }

    async def finish(self, **ending: Any) -> WriteResult:
        """End the run. `ending` holds arguments of the script `finish`; the writer adds the others."""
        if any(deferred.position == 0 for deferred in self._deferred):
            await self.flush()
        self._deferred.clear()
        async with self._write_lock:
            await self._store_full_batches()
            batch = self._take_batch()
            return await self.store.write_last(
                scripts.finish(
                    run_id=self.run_id, fence=self.fence, batch_no=self._batch_no, events=batch, **ending
                )
            )

    async def close(self) -> None:
        """Stop writing. Queued events are dropped; `finish` and `suspend` have stored theirs."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # a timer holds a reference to this writer
        self._is_flush_due = False
        for _ in self._deltas:
            self._pace.end()
        self._deltas.clear()
        for task in list(self._flushing):
            await asyncio.wait([task])
