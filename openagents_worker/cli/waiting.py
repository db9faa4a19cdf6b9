"""Why a run waits, and until when: for its time, for its session, for a retry, for a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, assert_never

from openagents_worker.cli.times import clock_time, span
from openagents_worker.models import RunRecord, RunState
from openagents_worker.store.client import Plan
from openagents_worker.store.fleet import WorkerInfo, read_workers
from openagents_worker.store.keys import Keys

__all__ = ["WaitingFor", "WaitsFor", "all_busy", "nobody_serves", "waiting_of"]


class WaitsFor(StrEnum):
    START = "start"  # its countdown
    RETRY = "retry"
    SESSION = "session"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class WaitingFor:
    """What a run waits for. `until_ms` is a time of Redis's clock; `behind` is the run that has the
    session."""

    kind: WaitsFor
    text: str
    until_ms: int | None = None
    behind: str | None = None


def waiting_of(keys: Keys, run: RunRecord) -> Plan[WaitingFor | None]:
    """What the run waits for; None for one that is being executed or is over."""
    match run.state:
        case RunState.SCHEDULED:
            now_ms = yield from _now_ms(keys)
            return WaitingFor(WaitsFor.START, f"its start is due {_due(run.due_ms, now_ms)}", run.due_ms)
        case RunState.RETRYING:
            now_ms = yield from _now_ms(keys)
            error = run.last_error
            why = f" after {error.code}" if error is not None else ""
            said = f": {error.message}" if error is not None and error.message else ""
            return WaitingFor(WaitsFor.RETRY, f"retry{why} {_due(run.due_ms, now_ms)}{said}", run.due_ms)
        case RunState.WAITING_SESSION:
            return (yield from _for_session(keys, run))
        case RunState.QUEUED:
            workers = yield from read_workers(keys)
            problem = nobody_serves(workers, run.queue, run.agent_id) or all_busy(workers, run.queue)
            text = problem or f"a worker of queue {run.queue} has not taken it yet"
            return WaitingFor(WaitsFor.WORKER, text)
        case RunState.RUNNING | RunState.COMPLETED | RunState.FAILED | RunState.CANCELLED:
            return None
        case _:
            assert_never(run.state)


def nobody_serves(workers: Sequence[WorkerInfo], queue: str, agent_id: str | None = None) -> str | None:
    """Why no worker that is alive will take a run of the agent from the queue; None where one may."""
    alive = [worker for worker in workers if worker.is_alive]
    start = f"start one: openagents-worker worker --queues {queue}"
    if not alive:
        return f"no worker serves queue {queue}: no worker is alive; {start}"
    if not all(worker.says_what_it_serves for worker in alive):
        return None
    consuming = [worker for worker in alive if queue in worker.queues]
    if not consuming:
        others = ", ".join(sorted({name for worker in alive for name in worker.queues})) or "none"
        count = f"{len(alive)} {'worker is' if len(alive) == 1 else 'workers are'} alive"
        return f"no worker serves queue {queue}: {count}, with the queues {others}; {start}"
    if agent_id is not None and not any(agent_id in worker.agents for worker in consuming):
        known = ", ".join(sorted({id_ for worker in consuming for id_ in worker.agents})) or "none"
        return f"no worker of queue {queue} has the agent {agent_id}: they have {known}"
    return None


def all_busy(workers: Sequence[WorkerInfo], queue: str) -> str | None:
    """That no worker of the queue can take another run; None where one can, or nobody knows."""
    serving = [worker for worker in workers if worker.serves(queue)]
    if not serving or not all(worker.max_runs and worker.runs >= worker.max_runs for worker in serving):
        return None
    runs = sum(worker.runs for worker in serving)
    count = "the one worker" if len(serving) == 1 else f"all {len(serving)} workers"
    return f"{count} of queue {queue} {'is' if len(serving) == 1 else 'are'} full: {runs} runs at work"


def _for_session(keys: Keys, run: RunRecord) -> Plan[WaitingFor]:
    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=True)
        pipeline.hget(keys("session", run.session_id), "holder")
        pipeline.zrank(keys("session_queue", run.session_id), run.run_id)
        return pipeline.execute()

    holder, place = yield question
    ahead = f", and {place} more before it" if place else ""
    text = f"session {run.session_id} is busy with run {holder or '?'}{ahead}"
    return WaitingFor(WaitsFor.SESSION, text, behind=holder)


def _now_ms(keys: Keys) -> Plan[int]:
    seconds, micros = yield lambda r: r.time()
    return int(seconds * 1000 + micros // 1000)


def _due(due_ms: int | None, now_ms: int) -> str:
    if due_ms is None:
        return "soon"
    left_ms = due_ms - now_ms
    when = f"in {span(left_ms)}" if left_ms > 0 else f"{span(-left_ms)} ago: a worker has to wake it"
    return f"at {clock_time(due_ms)} ({when})"
