"""Checkpoints: the only place that gives each record of a run its position in the journal, and stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openagents_worker.models import RunUsage
from openagents_worker.models.usage import NO_USAGE
from openagents_worker.runtime.call_outcome import Event
from openagents_worker.runtime.effects import Effects
from openagents_worker.runtime.history import RunHistory
from openagents_worker.runtime.identity import RunIdentity
from openagents_worker.runtime.journal import Record, check_record, spent_record
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.store.facts import Fact, FactKind
from openagents_worker.store.formats import BY_PLACE, HAS_JOB
from openagents_worker.tools.jobs import is_of_job

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of one attempt. Each of them is a record with its events and the usage of the run."""

    def __init__(
        self,
        identity: RunIdentity,
        history: RunHistory,
        writer: RunWriter,
        effects: Effects,
        *,
        durable: bool,
    ) -> None:
        self.usage = NO_USAGE
        """The usage of the calls that were answered: replayed or made."""
        self.total_usage = history.usage
        """The usage of the whole run, also of calls that are not replayed yet."""
        self.position = history.length
        """The journal position of the next record."""
        self.noted: dict[str, Mapping[str, Any]] = dict(history.noted)
        """What was noted about calls that are not recorded yet, by call id."""
        self._run_id = identity.run_id
        self._life = identity.life
        self._format = history.rules.format
        self._transcript_length = history.start.transcript_length
        self._writer = writer
        self._effects = effects
        self._durable = durable
        self._checks = dict(history.checks)
        self._start: Record | None = None

    def set_start(self, start: Record) -> None:
        """Set checkpoint 0, the first record of the journal. It is stored later, see `store_start`."""
        self._start = start if self._durable else None

    def store_start(self) -> None:
        """Checkpoint 0 is complete: store it together with the next write."""
        if self._start is not None:
            start, self._start = self._start, None
            _, saved = self._assign_checkpoint(start)
            self._writer.defer_start(start.to_json(), saved)

    async def store(
        self,
        record: Record,
        events: list[Event],
        text: str = "",
        usage: RunUsage | None = None,
        taken: Sequence[str] = (),
    ) -> None:
        """Store a record. A cancellation during the write is raised after the write.

        `text` is its JSON and `usage` its usage, if they are known already. `taken` are the names of the
        facts that the record replaces.
        """
        self._writer.end_deltas(record.call)  # at once: a timer must not send them ahead of the record
        await self._writer.whole(
            self._write(record, events, text, usage, taken), name=f"commit {self._run_id} {record.call}"
        )

    async def _write(
        self, record: Record, events: list[Event], text: str, more: RunUsage | None, taken: Sequence[str]
    ) -> None:
        """Write a record with its events and the new usage of the run."""
        self.store_start()
        if record.usage:
            used = RunUsage(**record.usage) if more is None else more
            total = self.total_usage.plus(used)
            # As long as no record was left by another attempt, both are the same.
            self.usage = total if self.usage is self.total_usage else self.usage.plus(used)
            self.total_usage = total
            events = [*events, ("usage.updated", {"usage": self.total_usage.known()})]
        if not self._durable:
            for event in events:
                self._writer.emit(*event)
            if taken:
                await self._writer.take_facts(taken)
            return
        position, saved = self._assign_checkpoint(record)
        taken = [*taken, *self._effects.taken_by(record)]
        if self.noted.pop(record.call, None) is not None and record.kind != "tool":
            taken = [
                *taken,
                Fact(FactKind.RESPONSE, record.call, "").name,
            ]  # `calls.jobs` takes that of a job
        await self._writer.commit(
            position,
            text or record.to_json(),
            self.total_usage,
            [*events, saved],
            taken=taken,
        )

    def recorded_check(self, key: str) -> dict[str, Any] | None:
        """The recorded result of the check of an output; None if it was not checked yet.

        `key` is the digest of the output.
        """
        return self._checks.get(key)

    def record_check(self, key: str, outcome: dict[str, Any]) -> None:
        """Record the result of a check. It is stored with the next record, without a further round trip."""
        self._checks[key] = outcome
        if not self._durable or self._format == BY_PLACE:
            return
        self.store_start()
        record = check_record(key, outcome, life=self._life)
        position, saved = self._assign_checkpoint(record)
        self._writer.defer_record(position, record.to_json(), self.total_usage, [saved])

    @property
    def keeps_given_up(self) -> bool:
        """Whether the run keeps for later attempts which children it has given up."""
        return self._durable and self._format != BY_PLACE

    def count_given_up(self, call: str, child_id: str, usage: RunUsage, taken: Sequence[str]) -> None:
        """Count what a child has used that the program has given up. This is stored with the next record,
        and takes these facts.

        The program does not see it in its own usage: the time at which it is known differs from attempt to
        attempt.
        """
        self.total_usage = self.total_usage.plus(usage)
        updated: Event = ("usage.updated", {"usage": self.total_usage.known()})
        if not self.keeps_given_up:
            self._writer.emit(*updated)
            return
        self.store_start()
        record = spent_record(call, child_id, usage.counted(), life=self._life)
        position, saved = self._assign_checkpoint(record)
        self._writer.defer_record(position, record.to_json(), self.total_usage, [updated, saved], taken=taken)

    def _assign_checkpoint(self, record: Record) -> tuple[int, Event]:
        """Assign the next journal position. Returns it with the event `run.checkpoint_saved`."""
        position, self.position = self.position, self.position + 1
        payload = {
            "checkpoint_id": f"{self._run_id}:step:{position}",
            "step_index": position,
            "transcript_length": self._transcript_length,
            "call_id": record.call,
        }
        return position, ("run.checkpoint_saved", payload)

    async def store_fact(self, fact: Fact) -> None:
        """Store a fact ahead of the record that will replace it. A cancellation during the write is raised
        after the write."""
        self.store_start()
        await self._writer.whole(self._writer.write_fact(fact), name=f"fact {self._run_id} {fact.name}")

    async def store_note(self, call_id: str, value: Mapping[str, Any]) -> None:
        """Store a note about a call, before its outcome. Its record replaces the note. A cancellation during
        the write is raised after the write.

        A run with the job of a tool is left to workers that know about jobs.
        """
        self.noted[call_id] = value
        self.store_start()
        is_job = is_of_job(value)
        kind = FactKind.JOB if is_job else FactKind.RESPONSE
        await self._writer.whole(
            self._writer.write_fact(Fact.of(kind, call_id, dict(value)), HAS_JOB if is_job else 0),
            name=f"note {self._run_id} {call_id}",
        )
