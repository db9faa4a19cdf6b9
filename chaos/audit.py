"""The audit: everything is read back and compared with what the outside world has counted.

A run is *lost* if it was accepted and does not exist, and *stuck* if it does not end. A step is *repeated* if
an execution of it began after the execution that is recorded had arrived outside. An execution that was in
flight when its worker died is not recorded, so it may be made again: that is the documented limit.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from chaos.effects import Execution
from chaos.load import Accepted, session_order
from openagents_worker import Client
from openagents_worker.errors import RunNotFound
from openagents_worker.events import TERMINAL_EVENTS, RunEvent
from openagents_worker.models import RunRecord, RunState

__all__ = ["Audit", "audit"]

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
    keys_without_ttl: list[str] = field(default_factory=list)
    growth: list[str] = field(default_factory=list)
    producer_problems: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        return {name: len(found) for name, found in asdict(self).items()}

    def clean(self) -> bool:
        return not any(self.counts().values())


@dataclass(slots=True)
class _Run:
    """What Redis says about one run."""

    accepted: Accepted
    record: RunRecord
    events: Sequence[RunEvent]
    recorded: set[int] = field(default_factory=set)
    """The serial numbers of its recorded executions."""
    failed: set[str] = field(default_factory=set)
    """The ids of its calls whose recorded outcome is an error."""


def audit(
    client: Client,
    accepted: Sequence[Accepted],
    stuck: Iterable[str],
    executions: Sequence[Execution],
    data_losses: Sequence[tuple[float, float]] = (),
) -> tuple[Audit, Counter[str]]:
    """The violations, and how the runs ended: their number by state and error code.

    What was written during one of these data losses of Redis, or up to `UNSAVED_S` before it, may be missing:
    the run then counts as the ending `lost with Redis's data`, and a call may have no record.
    """
    found = Audit(stuck=[f"{run_id} has not ended" for run_id in stuck])
    by_serial = {each.serial: each for each in executions}
    by_key: dict[str, list[Execution]] = defaultdict(list)
    for each in executions:
        by_key[each.key].append(each)
    endings: Counter[str] = Counter()
    runs: dict[str, _Run] = {}
    for each_accepted in accepted:
        excused = _may_be_missing(each_accepted.at, data_losses)
        run = _read(client, each_accepted, found, endings if excused else None)
        if run is None:
            continue
        runs[each_accepted.run_id] = run
        endings[_ending(run.record)] += 1
        _check_ending(run, found)
        _check_events(run, found)
        _check_steps(run, by_serial, by_key, found, data_losses)
    for session, members in session_order(list(accepted)).items():
        _check_session(session, [runs[m.run_id] for m in members if m.run_id in runs], by_serial, found)
    return found, endings


def _may_be_missing(written: float, data_losses: Sequence[tuple[float, float]]) -> bool:
    return any(begin - UNSAVED_S <= written <= end for begin, end in data_losses)


def _read(client: Client, accepted: Accepted, found: Audit, excused: Counter[str] | None) -> _Run | None:
    try:
        record = client.record(accepted.run_id)
    except RunNotFound:
        if excused is not None:
            excused["lost with Redis's data"] += 1
            return None
        found.lost.append(f"{accepted.run_id} was accepted and does not exist")
        return None
    if record.state not in (RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED):
        return None  # it is in the list of the stuck ones
    run = _Run(accepted, record, list(client.handle(accepted.run_id).events()))
    for event in run.events:
        match event.name, event.payload:
            case "tool.succeeded", {"result": {"serial": int(serial)}}:
                run.recorded.add(serial)
            case "tool.failed", {"call_id": str(call_id)}:
                run.failed.add(call_id)
            case "tool.called", {"params": {"asked": int(serial)}} if serial:
                run.recorded.add(serial)
    if record.result is not None:
        run.recorded |= {int(serial) for serial in SERIAL.findall(str(record.result.final_output))}
    return run


def _ending(record: RunRecord) -> str:
    error = record.result.error_details if record.result is not None else None
    return record.state.value if error is None else f"{record.state.value}: {error.code}"


def _check_ending(run: _Run, found: Audit) -> None:
    ending = _ending(run.record)
    if run.record.state is RunState.COMPLETED or (
        run.accepted.cancelled and run.record.state is RunState.CANCELLED
    ):
        return
    found.unexpected_endings.append(f"{run.accepted.run_id} ended as {ending}")


def _check_events(run: _Run, found: Audit) -> None:
    name = run.accepted.run_id
    numbers = [event.seq for event in run.events]
    if numbers != list(range(1, len(numbers) + 1)):
        found.event_gaps.append(f"{name} has the events {numbers}")
    ends = [event.name for event in run.events if event.name in TERMINAL_EVENTS]
    if ends != [f"run.{run.record.state.value}"] or sum(event.final for event in run.events) != 1:
        found.terminal_events.append(f"{name} is {run.record.state.value} and has the terminal events {ends}")


def _check_steps(
    run: _Run,
    by_serial: Mapping[int, Execution],
    by_key: Mapping[str, Sequence[Execution]],
    found: Audit,
    data_losses: Sequence[tuple[float, float]],
) -> None:
    name = run.accepted.run_id
    recorded_keys: dict[str, Execution] = {}
    for serial in sorted(run.recorded):
        execution = by_serial.get(serial)
        if execution is None or execution.run_id != name:
            found.incomplete_results.append(
                f"{name} has recorded the execution {serial}, which is not its own"
            )
            continue
        recorded_keys[execution.key] = execution
    for key, winner in recorded_keys.items():
        for again in by_key[key]:
            if again.begun > winner.arrived:
                late_s = again.begun - winner.arrived
                found.repeated_steps.append(f"{key} was recorded and was executed again {late_s:.3f} s later")
    if run.record.state is RunState.COMPLETED:
        mine = [each for each in by_serial.values() if each.run_id == name]
        made = {each.key for each in mine if not _may_be_missing(each.arrived, data_losses)}
        unrecorded = {key for key in made - set(recorded_keys) if key.split(":", 2)[2] not in run.failed}
        if unrecorded:
            found.incomplete_results.append(
                f"{name} is completed, and these steps have no record: {unrecorded}"
            )


def _check_session(
    session: str, runs: Sequence[_Run], by_serial: Mapping[int, Execution], found: Audit
) -> None:
    """The recorded executions of a run of a session come before those of the next run."""
    last: tuple[str, float] | None = None
    for run in runs:
        arrived = [by_serial[serial].arrived for serial in run.recorded if serial in by_serial]
        if not arrived:
            continue
        if last is not None and min(arrived) < last[1]:
            kind = found.order if max(arrived) < last[1] else found.overlaps
            kind.append(f"in {session}, {run.accepted.run_id} executed a step before {last[0]} had ended")
        last = (run.accepted.run_id, max(arrived))
