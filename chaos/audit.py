"""The audit: everything is read back and compared with what the outside world has counted.

A run is *lost* if it was accepted and does not exist, and *stuck* if it does not end. A step is *repeated* if
an execution of it began after the execution that is recorded had arrived outside. An execution that was in
flight when its worker died is not recorded, so it may be made again: that is the documented limit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from chaos.effects import Execution
from chaos.evidence import Audit, Evidence, ReadRun, read_run
from chaos.load import Accepted, session_order
from chaos.waiting_audit import WaitingAudit
from openagents_worker import Client
from openagents_worker.errors import RunNotFound
from openagents_worker.events import TERMINAL_EVENTS
from openagents_worker.models import RunRecord, RunState

__all__ = ["audit"]


def audit(client: Client, evidence: Evidence) -> tuple[Audit, Counter[str]]:
    """The violations, and how the runs ended: their number by state and error code.

    What was written during one of the data losses of Redis may be missing: the run then counts as the ending
    `lost with Redis's data`, and a call may have no record.
    """
    stuck = list(evidence.stuck)
    found = Audit(stuck=[_not_ended(run_id) for run_id in stuck])
    waiting = WaitingAudit(evidence, found)
    by_serial = {each.serial: each for each in evidence.executions}
    by_key: dict[str, list[Execution]] = defaultdict(list)
    for each in evidence.executions:
        by_key[each.key].append(each)
    endings: Counter[str] = Counter()
    runs: dict[str, ReadRun] = {}
    sessions = session_order(list(evidence.accepted))
    interrupted = _may_be_interrupted(sessions)
    for accepted in evidence.accepted:
        excused = evidence.may_be_missing(accepted.at)
        run = _read(client, accepted, found, endings if excused else None, waiting, stuck)
        if run is None:
            continue
        runs[accepted.run_id] = run
        endings[_ending(run.record)] += 1
        _check_ending(run, found, waiting.failure_codes(run), may_be_cancelled=run.name in interrupted)
        _check_events(run, found)
        _check_steps(run, by_serial, by_key, found, evidence)
        waiting.check(run)
    for session, members in sessions.items():
        _check_session(session, [runs[m.run_id] for m in members if m.run_id in runs], by_serial, found)
    return found, endings


def _may_be_interrupted(sessions: Mapping[str, Sequence[Accepted]]) -> set[str]:
    """The runs that another run of their session may have ended."""
    return {
        run.run_id
        for members in sessions.values()
        for at, run in enumerate(members)
        if any(later.plan.on_busy != "enqueue" for later in members[at + 1 :])
    }


def _read(
    client: Client,
    accepted: Accepted,
    found: Audit,
    excused: Counter[str] | None,
    waiting: WaitingAudit,
    stuck: Collection[str],
) -> ReadRun | None:
    """What Redis says about a run that has ended. `stuck`: the runs that `found` names as such."""
    try:
        record = client.record(accepted.run_id)
    except RunNotFound:
        if excused is not None:
            excused["lost with Redis's data"] += 1
            return None
        found.lost.append(f"{accepted.run_id} was accepted and does not exist")
        return None
    if record.state not in (RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED):
        if accepted.run_id not in stuck:
            found.stuck.append(_not_ended(accepted.run_id))
        return None
    return read_run(client, accepted, record, waiting.was_steered(accepted.run_id))


def _not_ended(run_id: str) -> str:
    return f"{run_id} has not ended"


def _ending(record: RunRecord) -> str:
    error = record.result.error_details if record.result is not None else None
    return record.state.value if error is None else f"{record.state.value}: {error.code}"


def _check_ending(run: ReadRun, found: Audit, codes: set[str], *, may_be_cancelled: bool) -> None:
    """The run has completed, or somebody has ended it. `codes`: the errors that somebody has decided."""
    state = run.record.state
    if state is RunState.COMPLETED:
        return
    if state is RunState.CANCELLED and (run.accepted.cancelled or may_be_cancelled):
        return
    error = run.record.result.error_details if run.record.result is not None else None
    if state is RunState.FAILED and error is not None and error.code in codes:
        return
    found.unexpected_endings.append(f"{run.name} ended as {_ending(run.record)}")


def _check_events(run: ReadRun, found: Audit) -> None:
    name = run.name
    numbers = [event.seq for event in run.events]
    if numbers != list(range(1, len(numbers) + 1)):
        found.event_gaps.append(f"{name} has the events {numbers}")
    ends = [event.name for event in run.events if event.name in TERMINAL_EVENTS]
    if ends != [f"run.{run.record.state.value}"] or sum(event.final for event in run.events) != 1:
        found.terminal_events.append(f"{name} is {run.record.state.value} and has the terminal events {ends}")


def _check_steps(
    run: ReadRun,
    by_serial: Mapping[int, Execution],
    by_key: Mapping[str, Sequence[Execution]],
    found: Audit,
    evidence: Evidence,
) -> None:
    name = run.name
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
        if evidence.has_replica and evidence.may_be_missing(winner.arrived):
            continue  # one failover has lost the record, and a later one has brought it back
        for again in by_key[key]:
            if again.begun > winner.arrived:
                late_s = again.begun - winner.arrived
                found.repeated_steps.append(f"{key} was recorded and was executed again {late_s:.3f} s later")
    if run.record.state is RunState.COMPLETED:
        mine = [each for each in by_serial.values() if each.run_id == name]
        if any(event.name == "run.steered" for event in run.events):
            # A call of the model that its worker did not live to record is another call with the message.
            mine = [each for each in mine if each.n]
        made = {each.key for each in mine if not evidence.may_be_missing(each.arrived)}
        unrecorded = {key for key in made - set(recorded_keys) if key.split(":", 2)[2] not in run.failed}
        if unrecorded:
            found.incomplete_results.append(
                f"{name} is completed, and these steps have no record: {unrecorded}"
            )


def _check_session(
    session: str, runs: Sequence[ReadRun], by_serial: Mapping[int, Execution], found: Audit
) -> None:
    """The recorded executions of a run of a session come before those of the next run.

    A run that interrupts another one overtakes the runs that wait.
    """
    spans = [(run, arrived) for run in runs if (arrived := _arrivals(run, by_serial))]
    _check_overlaps(session, spans, found)
    in_order = [span for span in spans if span[0].accepted.plan.on_busy == "enqueue"]
    for (before, earlier), (run, later) in pairwise(in_order):
        if max(later) < min(earlier):
            found.order.append(f"in {session}, {run.name} worked before {before.name}")


def _arrivals(run: ReadRun, by_serial: Mapping[int, Execution]) -> list[float]:
    return [by_serial[serial].arrived for serial in run.recorded if serial in by_serial]


def _check_overlaps(session: str, spans: Sequence[tuple[ReadRun, list[float]]], found: Audit) -> None:
    in_time = sorted(spans, key=lambda span: min(span[1]))
    for (before, earlier), (run, later) in pairwise(in_time):
        if min(later) < max(earlier):
            found.overlaps.append(f"in {session}, {run.name} executed a step before {before.name} had ended")
