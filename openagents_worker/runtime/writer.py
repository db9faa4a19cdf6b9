"""The run writer: the only place that decides what an attempt writes to Redis, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from openagents_worker.jsontext import dumps
from openagents_worker.models import RunUsage
from openagents_worker.models.usage import NO_USAGE
from openagents_worker.quick_init import quick_init
from openagents_worker.runtime.call_ids import outside_runs
from openagents_worker.runtime.event_writer import FLUSH_S, Event, EventWriter
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.latch import Latch, LatchReason
from openagents_worker.runtime.services import Services
from openagents_worker.store import scripts
from openagents_worker.store.facts import Fact, FactKind
from openagents_worker.store.formats import PARKS, WRITTEN
from openagents_worker.store.parking import Park
from openagents_worker.store.scripts import DelegateAnswer, Delegated, ScriptCall, SuspendKind, WriteResult

__all__ = ["RunWriter", "facts_of_intent"]


@quick_init
@dataclass(frozen=True, slots=True)
class _DeferredRecord:
    """A record that is stored with the next write, with the events that announce it."""

    position: int
    record: str
    usage: RunUsage
    events: Sequence[Event]
    taken: Sequence[str] = ()
    """The names of the facts that it replaces."""


_reports: set[asyncio.Task[None]] = set()
"""The reports that are being sent. The event loop holds only weak references to tasks."""


class RunWriter(EventWriter):
    """Writes the records, events and state changes of one attempt, each with the fence of its claim."""

    def __init__(
        self, identity: RunIdentity, services: Services, *, store: FencedStore, latch: Latch, length: int = 0
    ) -> None:
        """`length` is the number of records in the journal."""
        super().__init__(identity, services, latch=latch)
        self.store = store
        self.fence = identity.fence
        self._length = length
        self._acknowledged = 0
        """The number of the last batch that Redis has stored."""
        self._deferred: list[_DeferredRecord] = []
        self.format = WRITTEN
        """The format of the records of this run. A worker that cannot read it skips the run."""
        self.facts_at_suspend: dict[str, Fact] = {}
        """Facts, by name, that are stored when the run is suspended, whatever the reason: its open waits."""
        self.closed_at_suspend: set[str] = set()
        """Names of facts that are deleted when the run is suspended: what they say begins again."""

    @property
    def _has_deferred(self) -> bool:
        return bool(self._deferred)

    async def _store_batch(self, batch: list[str]) -> None:
        if deferred := self._take_deferred():
            await self._commit(0, [], deferred[-1].usage, batch, deferred)
        elif batch:
            await self.store.write(
                scripts.emit(run_id=self.run_id, fence=self.fence, batch_no=self._batch_no, events=batch)
            )
            self._acknowledged = self._batch_no

    def defer_start(self, record: str, event: Event) -> None:
        """Queue record 0, to be stored with the next write. `event` announces its checkpoint."""
        self._deferred.append(_DeferredRecord(0, record, NO_USAGE, ()))
        self.emit(*event)

    def defer_record(
        self,
        position: int,
        record: str,
        usage: RunUsage,
        events: Sequence[Event],
        *,
        taken: Sequence[str] = (),
    ) -> None:
        """Queue record number `position`, to be stored with the next write or after `FLUSH_S` seconds.

        It is dropped when the run ends first, unless it replaces facts: else no later attempt needs it.
        """
        self._deferred.append(_DeferredRecord(position, record, usage, events, taken))
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

    async def write_fact(self, fact: Fact, format_: int = 0) -> None:
        """Store a fact ahead of the record that will replace it, after all queued events.

        `format_`: the format of the run from now on. Only workers that can read it execute the run.
        """
        await self._write_facts(facts=[fact.name, fact.text], format_=format_)

    async def _write_facts(self, *, format_: int = 0, **facts: Sequence[str]) -> None:
        """Store all queued events and change the facts of the run, with one script at last."""
        async with self._write_lock:
            await self._store_full_batches()
            batch = self._take_batch()
            await self.store.write(
                scripts.emit(
                    run_id=self.run_id,
                    fence=self.fence,
                    batch_no=self._batch_no,
                    events=batch,
                    format=format_,
                    **facts,
                )
            )
            self._acknowledged = self._batch_no

    async def write_intent(
        self, call: str, intent: str, knows_decision: bool, taken: Sequence[str] = ()
    ) -> str:
        """Store the intent of a call with effects, after all queued events and records. A cancellation during
        the write is raised after the write.

        Returns '', or a decision (JSON) about an earlier intent of the call: then it is not stored. With
        `OPENAGENTS_DURABILITY=strict` it is on disk when this returns.
        """
        writing = self._write_intent(call, intent, knows_decision, taken)
        return await self.whole(writing, name=f"intent {self.run_id} {call}")

    async def _write_intent(self, call: str, intent: str, knows_decision: bool, taken: Sequence[str]) -> str:
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
                    stored=self._length,
                )
            )
            self._acknowledged = self._batch_no
            return begun.decision

    @property
    def is_fenced(self) -> bool:
        """Whether nothing can be written any more: another worker owns the run, or will recover it."""
        return self._latch.reason is LatchReason.FENCED

    def close_intent_at_suspend(self, call: str) -> None:
        """If the run is suspended while this call only waits, the call begins again at its first line."""
        if self._latch.reason is None:  # else nobody knows how far the call will come
            self.closed_at_suspend.update(facts_of_intent(call))

    def keep_intent(self, call: str) -> None:
        """The intent of a call stays when the run is suspended."""
        self.closed_at_suspend.difference_update(facts_of_intent(call))

    async def ask(self, call: str, question: str) -> None:
        """Store what is asked about a call (JSON), after all queued events. A cancellation during the write
        is raised after the write."""
        await self.whole(self._ask(call, question), name=f"ask {self.run_id} {call}")

    async def _ask(self, call: str, question: str) -> None:
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
                    stored=self._length,
                )
            )
            self._acknowledged = self._batch_no

    async def delegate(self, **child: Any) -> Delegated:
        """Create the child run of a call or find it, after all queued events and records. `child` holds
        arguments of the script `delegate`. A cancellation during the write is raised after the write."""
        return await self.whole(self._delegate(child), name=f"delegate {self.run_id} {child['call']}")

    async def _delegate(self, child: Mapping[str, Any]) -> Delegated:
        await self.flush()
        async with self._write_lock:
            self._batch_no += 1
            delegated = await self.store.delegate(
                scripts.delegate(
                    run_id=self.run_id,
                    fence=self.fence,
                    stored=self._length,
                    batch_no=self._batch_no,
                    **child,
                )
            )
            if delegated.answer in (DelegateAnswer.NEW, DelegateAnswer.SAME):
                self._acknowledged = self._batch_no
            return delegated

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
            taken = [*chain.from_iterable(each.taken for each in deferred), *taken]
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
        self._acknowledged = self._batch_no

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
                    closed=sorted(self.closed_at_suspend),
                    **({} if park is None else self._parked(park)),
                )
            )

    def _parked(self, park: Park) -> dict[str, Any]:
        """The arguments of the script `suspend` for a run that is parked."""
        return {
            "park_state": park.state,
            "waits": park.waits_text,
            "acknowledged": self._acknowledged,
            "waiting_payload": park.event_payload,
            "due_ms": park.due_ms,
            "facts_seen": park.facts_seen,
            "limit": park.limit,
            "tenant": park.tenant,
            "format": PARKS,
        }

    async def finish(self, **ending: Any) -> WriteResult:
        """End the run. `ending` holds arguments of the script `finish`; the writer adds the others."""
        if any(deferred.position == 0 or deferred.taken for deferred in self._deferred):
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


def facts_of_intent(call: str) -> list[str]:
    """The names of the facts that belong to the intent of a call: its record replaces all of them."""
    kinds = (FactKind.INTENT, FactKind.FENCE, FactKind.RESOLUTION, FactKind.WAIT)
    return [Fact(kind, call, "").name for kind in kinds]
