"""The history of a run: the only place that reads what earlier attempts have left in the journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from openagents_worker.context.base import Selection
from openagents_worker.errors import DefinitionChanged, OtherFormat, ReplayMismatch
from openagents_worker.models import RunUsage
from openagents_worker.models.usage import NO_USAGE
from openagents_worker.quick_init import quick_init
from openagents_worker.runtime.effects import InterruptedCalls
from openagents_worker.runtime.facts import RunFacts
from openagents_worker.runtime.fenced_store import FencedStore
from openagents_worker.runtime.journal import (
    NOT_CALLS,
    PREPARE,
    Record,
    checks_of,
    read_pages,
    spent_by_children,
)
from openagents_worker.runtime.latch import Latch, LatchReason, RunLatched
from openagents_worker.runtime.replay import ReplayByContent
from openagents_worker.runtime.replay_by_place import ReplayByPlace
from openagents_worker.runtime.retry import Tries
from openagents_worker.runtime.rules import EXTEND, Rules
from openagents_worker.runtime.seeds import Seeds
from openagents_worker.runtime.waits import open_waits
from openagents_worker.runtime.working_budget import limits_in
from openagents_worker.store.facts import FactKind, Facts
from openagents_worker.store.formats import BEGUN, BY_PLACE, WRITTEN, translate_parse_errors
from openagents_worker.store.held_turns import HeldRange, HeldTurn, ranges_of
from openagents_worker.store.scripts import Claimed
from openagents_worker.store.sessions import SessionStore, TranscriptSummary, summary_of

__all__ = ["RunHistory", "RunStart", "read_history"]

MOST_GIVEN_UP = 100  # each attempt sends a command for each of them


@quick_init
@dataclass(frozen=True, slots=True)
class RunStart:
    """Where a run started in its session. Stored as checkpoint 0, so that every attempt starts there."""

    transcript_length: int
    artifact_count: int
    definition_hash: str
    memory_view: dict[str, Any] | None = None
    """The view of an external memory. Only in runs that are replayed by place; else it has its own record."""
    epoch: int = 0
    """The number of the summary that stood for the oldest messages of the session; 0: none."""
    selection: Selection | None = None
    """What the context assembler selected. None if it selects the same messages again."""
    held: tuple[HeldRange, ...] = ()
    """The turns of shared children that followed the messages of the session: the runs above hold them."""

    def to_record(self, format_: int, tools: Mapping[str, Any]) -> Record:
        """`tools` says which tools there are, see `RunTools.at_start`. Earlier versions ignore it, as they
        ignore the context."""
        value: dict[str, Any] = {
            "transcript_length": self.transcript_length,
            "artifact_count": self.artifact_count,
            "definition_hash": self.definition_hash,
        }
        outcome = {"ok": value, **tools, **self._context_in_record()}
        return Record(PREPARE, "prepare", "", outcome, self.definition_hash, v=format_)

    def _context_in_record(self) -> dict[str, Any]:
        context: dict[str, Any] = {"epoch": self.epoch} if self.epoch else {}
        if self.selection is not None:
            context["selection"] = self.selection.model_dump(mode="json", exclude_defaults=True)
        if self.held:
            context["held"] = [part for held in self.held for part in (held.run_id, held.begin, held.end)]
        return {"context": context} if context else {}

    @classmethod
    def of(cls, record: Record) -> RunStart:
        """Raises `RecordUnreadable`."""
        with translate_parse_errors(WRITTEN):
            context = record.outcome.get("context", {})
            selection = context.get("selection")
            return cls(
                **record.outcome["ok"],
                epoch=int(context.get("epoch", 0)),
                selection=None if selection is None else Selection.model_validate(selection),
                held=ranges_of(context.get("held", ())),
            )


@quick_init
@dataclass(frozen=True, slots=True)
class RunHistory:
    """What earlier attempts have left: an empty history in the first attempt."""

    start_record: Record | None
    """Checkpoint 0; None if no earlier attempt has stored it."""
    start: RunStart
    """Where the run starts in its session."""
    summary: TranscriptSummary | None
    """The summary of `start.epoch`."""
    held: Sequence[HeldTurn]
    """The turns of `start.held`."""
    rules: Rules
    length: int
    """The number of records in the journal."""
    usage: RunUsage
    """The usage of all of them, also of those that are not replayed."""
    checks: Mapping[str, dict[str, Any]]
    """The recorded results of output checks, by digest of the output."""
    tries: Tries
    seeds: Seeds
    """From which its random values derive."""
    noted: Mapping[str, Mapping[str, Any]]
    """Calls that go on outside and are not recorded yet, by call id: responses of a model, jobs of a tool."""
    facts: Facts
    """The facts of the run, as of the claim."""
    interrupted: InterruptedCalls
    """Calls with effects that earlier attempts have begun and not recorded."""
    extended: Mapping[str, float]
    """The largest value of each limit in the recorded extensions of the budget."""
    definition_changed: bool
    """Whether the definition of the agent has changed since the run began."""
    given_up: Sequence[str]
    """The newest delegations that the program has cancelled in this life, by call id."""
    spent: Mapping[str, RunUsage]
    """What is recorded of the usage of children that the program has given up, by their ids."""

    def mismatch(self, problem: str, run_id: str, changed_tools: Sequence[str] = ()) -> ReplayMismatch:
        """The error for a program that contradicts this history.

        `changed_tools` are described in another way than when the run began.
        """
        if changed_tools:
            problem += f"; changed since the run began: {', '.join(changed_tools)}"
        if self.definition_changed or changed_tools:
            hint = "submit the run again, or restore the previous definition of the agent"
            return DefinitionChanged(problem, hint=hint, run_id=run_id)
        hint = "only recorded calls may use the time or random numbers; was the pattern changed?"
        return ReplayMismatch(problem, hint=hint, run_id=run_id)


async def read_history(
    claimed: Claimed, run_facts: RunFacts, definition_hash: str, *, tries: Tries, latch: Latch
) -> RunHistory:
    """Read the journal of a claimed run.

    Raises `RunLatched` if a record has a format that this version cannot read: the run is left to others.
    """
    store, facts = run_facts.store, run_facts.at_claim
    records = await _read_records(claimed, store, latch)
    start_record = records.pop(0) if records else None
    current_start = RunStart(
        claimed.messages,
        claimed.artifacts,
        definition_hash,
        epoch=claimed.epoch if claimed.compaction else 0,
        held=run_facts.held.above,
    )
    start = RunStart.of(start_record) if start_record else current_start
    run_facts.held.has_records(records)
    # Checkpoint 0 holds the format under which the run began.
    format_ = start_record.v if start_record is not None else BEGUN
    replayed = [record for record in records if record.kind not in NOT_CALLS]
    interrupted = InterruptedCalls.of(facts)
    rules: Rules
    if format_ == BY_PLACE:
        rules = ReplayByPlace(replayed, life=claimed.life, latch=latch, tries=tries.of_call)
    else:
        begun = [*interrupted.open_calls(), *open_waits(facts)]
        rules = ReplayByContent(replayed, begun=begun, life=claimed.life, latch=latch, tries=tries.of_call)
    return RunHistory(
        start_record=start_record,
        start=start,
        summary=await _summary_at(start, claimed, store),
        held=await run_facts.held.load(start.held) if start.held else (),
        rules=rules,
        length=claimed.journal_length,
        usage=_usage(claimed, records),
        checks=checks_of(records, claimed.life),
        tries=tries,
        seeds=Seeds.of(store.run_id, claimed),
        noted=_notes(facts),
        facts=facts,
        interrupted=interrupted,
        extended=_extended(records),
        definition_changed=start.definition_hash != current_start.definition_hash,
        given_up=_given_up(records, claimed.life),
        spent=spent_by_children(records),
    )


def _usage(claimed: Claimed, records: Sequence[Record]) -> RunUsage:
    """The usage of a run so far. A fork has only records, which it has copied."""
    if claimed.usage:
        with suppress(ValueError):  # unreadable usage must not prevent the run from continuing
            usage = RunUsage.model_validate_json(claimed.usage)
            return usage.model_copy(update={"llm_latency_p50_ms": None, "llm_latency_p95_ms": None})
    usage = NO_USAGE
    for record in records:
        usage = usage.plus(RunUsage(**record.usage)) if record.usage else usage
    return usage


def _given_up(records: Sequence[Record], life: int) -> Sequence[str]:
    last = {each.call: each for each in records if each.kind == "delegate" and each.life == life}
    return [call for call, record in last.items() if record.is_cancelled][-MOST_GIVEN_UP:]


def _extended(records: Sequence[Record]) -> dict[str, float]:
    extended: dict[str, float] = {}
    for record in records:
        if record.kind == EXTEND:
            for name, limit in limits_in(record.outcome.get("ok")).items():
                extended[name] = max(limit, extended.get(name, limit))
    return extended


async def _summary_at(start: RunStart, claimed: Claimed, store: FencedStore) -> TranscriptSummary | None:
    """The summary that the run began with. Other runs may have replaced it since, if this one was resumed."""
    if not start.epoch:
        return None
    session_id = store.session_id
    if start.epoch == claimed.epoch:
        with translate_parse_errors(WRITTEN, session_id=session_id):
            return summary_of(claimed.epoch, claimed.compacted, claimed.compaction)
    return await SessionStore(store).load_summary(session_id, start.epoch)


def _notes(facts: Facts) -> dict[str, dict[str, Any]]:
    if not facts:
        return {}
    notes = {fact.id: fact.value() for kind in (FactKind.RESPONSE, FactKind.JOB) for fact in facts.of(kind)}
    return {call: value for call, value in notes.items() if isinstance(value, dict)}


async def _read_records(claimed: Claimed, store: FencedStore, latch: Latch) -> list[Record]:
    """All records of the journal. If one has another format, the run is left to others."""
    records: list[Record] = []
    if not claimed.journal_length:
        return records
    async for text in read_pages(store.journal_page, claimed.journal, claimed.journal_length):
        try:
            records.append(Record.from_json(text, len(records)))
        except OtherFormat as error:
            # Rare: the claim has already checked the format in the run record.
            latch.set(LatchReason.LEFT_TO_OTHERS, error=error)
            raise RunLatched(LatchReason.LEFT_TO_OTHERS) from error
    return records
