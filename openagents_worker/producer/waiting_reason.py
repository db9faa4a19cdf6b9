"""Why a run waits. The only place that finds the reason: its start time, its session, a retry or a worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, assert_never

from openagents_worker.models import RunRecord, RunState
from openagents_worker.producer.time_text import age_text, clock_time
from openagents_worker.store.client import Plan
from openagents_worker.store.fleet import WorkerInfo, read_workers
from openagents_worker.store.keys import Keys
from openagents_worker.store.row_reads import ReadBy

__all__ = [
    "ReasonKind",
    "WaitingReason",
    "read_waiting_reason",
    "read_workers_for",
    "short_reason",
    "why_not_served",
    "why_runs_wait",
]


class ReasonKind(StrEnum):
    START = "start"  # the start time that the producer asked for
    RETRY = "retry"
    SESSION = "session"
    WORKER = "worker"
    FACT = "fact"  # what a parked run waits for


@dataclass(frozen=True, slots=True)
class WaitingReason:
    """Why a run waits.

    `until_ms` is in milliseconds since the epoch, by the clock of Redis. `behind` is the id of the run that
    occupies the session.
    """

    kind: ReasonKind
    text: str
    until_ms: int | None = None
    behind: str | None = None


def read_waiting_reason(
    keys: Keys, run: RunRecord, read_by: ReadBy = ReadBy.COMMANDS
) -> Plan[WaitingReason | None]:
    """Read why the run waits. None: it is being executed or has ended."""
    match run.state:
        case RunState.SCHEDULED:
            now_ms = yield from _now_ms(keys)
            return WaitingReason(ReasonKind.START, f"its start is due {_due(run.due_ms, now_ms)}", run.due_ms)
        case RunState.RETRYING:
            now_ms = yield from _now_ms(keys)
            error = run.last_error
            why = f" after {error.code}" if error is not None else ""
            message = f": {error.message}" if error is not None and error.message else ""
            return WaitingReason(
                ReasonKind.RETRY, f"retry{why} {_due(run.due_ms, now_ms)}{message}", run.due_ms
            )
        case RunState.WAITING_SESSION:
            return (yield from _session_reason(keys, run))
        case RunState.QUEUED:
            workers = yield from read_workers(keys, read_by)
            problem = why_runs_wait(workers, run.queue, run.agent_id)
            text = problem or f"no worker of queue {run.queue} has started it yet"
            return WaitingReason(ReasonKind.WORKER, text)
        case RunState.AWAITING_APPROVAL | RunState.WAITING_CHILD | RunState.WAITING | RunState.PAUSED:
            now_ms = yield from _now_ms(keys)
            until = f"; it continues {_due(run.due_ms, now_ms)} at the latest" if run.due_ms else ""
            return WaitingReason(ReasonKind.FACT, f"{_waited_for(run)}{until}", run.due_ms)
        case RunState.RUNNING | RunState.COMPLETED | RunState.FAILED | RunState.CANCELLED:
            return None
        case _:
            assert_never(run.state)


def read_workers_for(
    keys: Keys, runs: Iterable[RunRecord], read_by: ReadBy = ReadBy.COMMANDS
) -> Plan[Sequence[WorkerInfo] | None]:
    """Read what `short_reason` needs for these runs: the workers, if one of the runs is queued."""
    if all(run.state is not RunState.QUEUED for run in runs):
        return None
    return (yield from read_workers(keys, read_by))


def short_reason(run: RunRecord, workers: Sequence[WorkerInfo] | None) -> str:
    """Why the run ended or waits, in a few words, for a row of a list; '' if its state says it all.

    `workers` are those of `read_workers_for`. None: whether a worker serves the run is not said.
    """
    if run.reason_code:
        return run.reason_code
    if run.state is RunState.QUEUED and workers is not None:
        problem = _unserved(workers, run.queue, run.agent_id)
        return problem.what if problem is not None else ""
    return ", ".join(dict.fromkeys(map(str, run.waiting)))


def _waited_for(run: RunRecord) -> str:
    """What a parked run waits for: `waits for signal paid and for a timer`."""
    each = [f"for {wait}" if wait.name else f"for a {wait}" for wait in run.waiting]
    return f"waits {' and '.join(dict.fromkeys(each)) or 'for a decision'}"


def why_runs_wait(workers: Sequence[WorkerInfo], queue: str, agent_id: str | None = None) -> str | None:
    """Why runs of this queue and agent wait: no worker serves them, or all who do are full. None: neither."""
    return why_not_served(workers, queue, agent_id) or _why_no_free_slot(workers, queue)


def why_not_served(workers: Sequence[WorkerInfo], queue: str, agent_id: str | None = None) -> str | None:
    """Why no live worker can execute a run of this queue and agent. None: a worker may be able to."""
    problem = _unserved(workers, queue, agent_id)
    return f"{problem.what}: {problem.more}" if problem is not None else None


class _Unserved(NamedTuple):
    """That no worker serves a run: in a few words, and what there is instead."""

    what: str
    more: str


def _unserved(workers: Sequence[WorkerInfo], queue: str, agent_id: str | None) -> _Unserved | None:
    alive = [worker for worker in workers if worker.is_alive]
    what, start = f"no worker serves queue {queue}", f"start one: openagents-worker worker --queues {queue}"
    if not alive:
        return _Unserved(what, f"no worker is alive; {start}")
    if not all(worker.says_what_it_serves for worker in alive):
        return None
    consuming = [worker for worker in alive if queue in worker.queues]
    if not consuming:
        others = ", ".join(sorted({name for worker in alive for name in worker.queues})) or "none"
        count = f"{len(alive)} {'worker is' if len(alive) == 1 else 'workers are'} alive"
        return _Unserved(what, f"{count}, with the queues {others}; {start}")
    if agent_id is not None and not any(agent_id in worker.agents for worker in consuming):
        known = ", ".join(sorted({id_ for worker in consuming for id_ in worker.agents})) or "none"
        return _Unserved(f"no worker of queue {queue} has the agent {agent_id}", f"their agents are {known}")
    return None


def _why_no_free_slot(workers: Sequence[WorkerInfo], queue: str) -> str | None:
    """That no worker of the queue has a free slot. None: one has, or the number of slots is unknown."""
    serving = [worker for worker in workers if worker.serves(queue)]
    if not serving or not all(worker.max_runs and worker.runs >= worker.max_runs for worker in serving):
        return None
    runs = sum(worker.runs for worker in serving)
    active = "1 active run" if runs == 1 else f"{runs} active runs"
    count = "the one worker" if len(serving) == 1 else f"all {len(serving)} workers"
    return f"{count} of queue {queue} {'is' if len(serving) == 1 else 'are'} full: {active}"


def _session_reason(keys: Keys, run: RunRecord) -> Plan[WaitingReason]:
    def read_holder_and_position(client: Any) -> Any:
        pipeline = client.pipeline(transaction=True)
        pipeline.hget(keys("session", run.session_id), "holder")
        pipeline.zrank(keys("session_queue", run.session_id), run.run_id)
        return pipeline.execute()

    holder, position = yield read_holder_and_position
    ahead = f", and {position} more before it" if position else ""
    text = f"session {run.session_id} is busy with run {holder or '?'}{ahead}"
    return WaitingReason(ReasonKind.SESSION, text, behind=holder)


def _now_ms(keys: Keys) -> Plan[int]:
    seconds, micros = yield lambda r: r.time()
    return int(seconds * 1000 + micros // 1000)


def _due(due_ms: int | None, now_ms: int) -> str:
    if due_ms is None:
        return "soon"
    left_ms = due_ms - now_ms
    when = (
        f"in {age_text(left_ms)}" if left_ms > 0 else f"{age_text(-left_ms)} ago: no worker has woken it yet"
    )
    return f"at {clock_time(due_ms)} ({when})"
