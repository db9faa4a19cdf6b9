"""What a chaos run has left: what everybody outside knows, what Redis says about each run, what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from chaos.effects import Execution, NotFound
from chaos.load import Accepted
from chaos.people import DeciderAnswer, Resolved, Steered
from openagents_worker import Client
from openagents_worker.events import RunEvent
from openagents_worker.models import RunRecord

__all__ = ["Audit", "Evidence", "ReadRun", "read_run"]

UNSAVED_S = 2.0
SERIAL = re.compile(r"#(\d+)")


@dataclass(slots=True)
class Audit:
    """The violations that were found, each as a sentence. All lists must be empty."""

    lost: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    repeated_steps: list[str] = field(default_factory=list)
    terminal_events: list[str] = field(default_factory=list)
    event_gaps: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    overlaps: list[str] = field(default_factory=list)
    unexpected_endings: list[str] = field(default_factory=list)
    incomplete_results: list[str] = field(default_factory=list)
    wrong_decisions: list[str] = field(default_factory=list)
    wrong_effects: list[str] = field(default_factory=list)
    wrong_values: list[str] = field(default_factory=list)
    wrong_steering: list[str] = field(default_factory=list)
    early_wakes: list[str] = field(default_factory=list)
    keys_without_ttl: list[str] = field(default_factory=list)
    growth: list[str] = field(default_factory=list)
    producer_problems: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        return {name: len(found) for name, found in asdict(self).items()}

    def clean(self) -> bool:
        return not any(self.counts().values())


@dataclass(slots=True)
class Evidence:
    """What everybody outside the workers knows."""

    accepted: Sequence[Accepted]
    stuck: Iterable[str] = ()
    executions: Sequence[Execution] = ()
    not_found: Sequence[NotFound] = ()
    answers: Sequence[DeciderAnswer] = ()
    resolved: Sequence[Resolved] = ()
    sent: Mapping[str, Sequence[float]] = field(default_factory=dict)
    steered: Sequence[Steered] = ()
    data_losses: Sequence[tuple[float, float]] = ()
    has_replica: bool = False
    """Whether a failover may also bring back what an earlier failover has lost."""

    def may_be_missing(self, written: float) -> bool:
        """Whether Redis may have lost what was written at this moment: during one of its data losses, or up
        to `UNSAVED_S` before."""
        return any(begin - UNSAVED_S <= written <= end for begin, end in self.data_losses)


@dataclass(slots=True)
class ReadRun:
    """What Redis says about one run that has ended."""

    accepted: Accepted
    record: RunRecord
    events: Sequence[RunEvent]
    recorded: set[int] = field(default_factory=set)
    """The serial numbers of its recorded executions."""
    failed: set[str] = field(default_factory=set)
    """The ids of its calls whose recorded outcome is an error."""
    results: dict[str, int] = field(default_factory=dict)
    """The serial number that each call of a tool has returned, by the id of the call."""
    collected: list[object] = field(default_factory=list)
    """The values that its tools have received."""

    @property
    def name(self) -> str:
        return self.accepted.run_id


def read_run(client: Client, accepted: Accepted, record: RunRecord, was_steered: bool) -> ReadRun:
    """Read the events of the run. `was_steered`: an answer that a message has followed is in its journal."""
    run = ReadRun(accepted, record, list(client.handle(accepted.run_id).events()))
    for event in run.events:
        match event.name, event.payload:
            case "tool.succeeded", {"result": {"serial": int(serial)}, "call_id": str(call_id)}:
                run.recorded.add(serial)
                run.results[call_id] = serial
            case "tool.succeeded", {"result": {"mail": value}}:
                run.collected.append(value)
            case "tool.failed", {"call_id": str(call_id)}:
                run.failed.add(call_id)
            case "tool.called", {"params": {"asked": int(serial)}} if serial:
                run.recorded.add(serial)
    texts = [str(record.result.final_output)] if record.result is not None else []
    if was_steered:
        texts += [str(each.value) for each in client.checkpoints(accepted.run_id) if each.kind == "model"]
    run.recorded |= {int(serial) for text in texts for serial in SERIAL.findall(text)}
    return run
