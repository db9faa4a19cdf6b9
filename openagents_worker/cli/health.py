"""The health of a deployment. The only place that finds its problems and formats `status` and `workers`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from openagents_worker.cli.display import short
from openagents_worker.cli.terminal import Safe, columns, joined, styled, table
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from openagents_worker.producer.time_text import age_text
from openagents_worker.producer.waiting_reason import why_runs_wait
from openagents_worker.store.dead_letters import PutAside
from openagents_worker.store.fleet import Fleet, QueueInfo, WorkerInfo, read_fleet
from openagents_worker.store.listing import Problem

__all__ = [
    "problems_of",
    "queue_table",
    "read_known_fleet",
    "status_json",
    "status_lines",
    "worker_json",
    "worker_table",
]

LAG_MS = 1000  # a longer lag of the event loop is a problem: it delays every run of the process
MAX_NAMED_KEYS = 5
MAX_PUT_ASIDE_ROWS = 20


def problems_of(fleet: Fleet, unreadable: Sequence[Problem], aside: Sequence[PutAside] = ()) -> list[str]:
    """One sentence for each problem of the deployment; an empty list if there is none."""
    return [
        *_queue_problems(fleet),
        *_agent_problems(fleet),
        *(problem for worker in fleet.workers for problem in _worker_problems(worker)),
        *_record_problems(unreadable),
        *_put_aside_problems(aside),
    ]


def read_known_fleet(client: Client, queues: Iterable[str] | None = None) -> Fleet:
    """The fleet without agents that were taken out of the agents file: no worker and no open run has them.

    All agents are kept while no worker is alive, or while one does not announce what it serves. `queues` are
    those that no worker announces; None: search all keys of Redis for them.
    """
    fleet = client.store.execute(
        read_fleet(client.store.keys, client.settings.queue, scans_queues=queues is None, queues=queues or ())
    )
    alive = [worker for worker in fleet.workers if worker.is_alive]
    if not alive or not all(worker.says_what_it_serves for worker in alive):
        return fleet
    return replace(fleet, agents=tuple(a for a in fleet.agents if a.workers or _has_open_runs(client, a.id)))


def _has_open_runs(client: Client, agent_id: str) -> bool:
    """Whether a run of the agent has not ended. True as well if there are too many runs to find out."""
    open_states = [state for state in RunState if not state.is_terminal]
    page = client.runs(agent_id=agent_id, state=open_states, limit=1)
    return bool(page.items or page.next_cursor)


def worker_table(workers: Sequence[WorkerInfo], now_ms: int) -> list[Safe]:
    """A table of workers. `now_ms` is the current time in milliseconds since the epoch."""
    rows = [
        (
            worker.incarnation,
            worker.host,
            worker.version or "earlier",
            ",".join(worker.queues) if worker.says_what_it_serves else "?",
            ",".join(worker.agents) if worker.says_what_it_serves else "?",
            f"{worker.runs}/{worker.max_runs or '?'}",
            "?" if worker.loop_lag_ms is None else f"{worker.loop_lag_ms} ms",
            f"{worker.lease_left_ms / 1000:.1f} s" if worker.is_alive else styled("expired", fg="red"),
            "?" if worker.started_at is None else age_text(now_ms - worker.started_at.timestamp() * 1000),
        )
        for worker in workers
    ]
    header = ("WORKER", "HOST", "VERSION", "QUEUES", "AGENTS", "RUNS", "LOOP LAG", "LEASE LEFT", "AGE")
    return table(header, rows, flexible=("AGENTS", "HOST", "QUEUES", "WORKER"), width=columns())


def queue_table(queues: Sequence[QueueInfo]) -> list[Safe]:
    """A table of queues: how many runs wait, the oldest of them, and who consumes the queue."""
    rows = [
        (
            queue.name,
            str(queue.waiting),
            "" if queue.oldest_age_ms is None else age_text(queue.oldest_age_ms),
            str(queue.sent_again),
            ",".join(queue.workers) or styled("none", fg="red" if queue.waiting else None),
        )
        for queue in queues
    ]
    header = ("QUEUE", "WAITING", "OLDEST", "SENT AGAIN", "WORKERS")
    return table(header, rows, flexible=("WORKERS", "QUEUE"), width=columns())


def status_lines(
    fleet: Fleet, unreadable: Sequence[Problem], now_ms: int, aside: Sequence[PutAside] = ()
) -> list[Safe]:
    """The text of `status`: problems, workers, queues, agents and the items that were put aside."""
    problems = problems_of(fleet, unreadable, aside)
    lines = [joined(styled("problem: ", fg="red", bold=True), problem) for problem in problems]
    lines = lines or [styled("no problems", fg="green")]
    lines += [Safe(""), *(worker_table(fleet.workers, now_ms) if fleet.workers else [Safe("no workers")])]
    lines += _parts_table(fleet.workers, now_ms)
    lines += [Safe(""), *queue_table(fleet.queues)]
    agents = [
        (agent.id, agent.queue, ",".join(agent.workers) or styled("none", fg="yellow"))
        for agent in fleet.agents
    ]
    if agents:
        found = table(("AGENT", "QUEUE", "WORKERS"), agents, flexible=("WORKERS", "AGENT"), width=columns())
        lines += [Safe(""), *found]
    if fleet.limits:
        waiting = [(limit.name, str(limit.waiting), str(limit.in_use)) for limit in fleet.limits]
        found = table(("LIMIT", "WAITING", "IN USE"), waiting, flexible=("LIMIT",), width=columns())
        lines += [Safe(""), *found]
    if aside:
        rows = [
            (
                age_text(now_ms - one.since.timestamp() * 1000),
                one.key,
                one.code,
                one.moved_to or short(one.item),
                one.what,
            )
            for one in aside[:MAX_PUT_ASIDE_ROWS]
        ]
        header = ("AGE", "PUT ASIDE", "CODE", "NOW", "WHY")
        lines += [Safe(""), *table(header, rows, flexible=("WHY", "NOW", "PUT ASIDE"), width=columns())]
    return lines


def _parts_table(workers: Sequence[WorkerInfo], now_ms: int) -> list[Safe]:
    """The background parts that have a problem, or had one in the last minutes; empty if there are none."""
    rows = [
        (
            worker.incarnation,
            part.part,
            styled(part.state, fg="red" if part.is_problem else None),
            age_text(now_ms - part.since.timestamp() * 1000),
            str(part.failures),
            part.code or "",
        )
        for worker in workers
        for part in worker.parts
    ]
    header = ("WORKER", "PART", "STATE", "SINCE", "FAILURES", "LAST ERROR")
    return (
        [Safe(""), *table(header, rows, flexible=("LAST ERROR", "WORKER"), width=columns())] if rows else []
    )


def worker_json(worker: WorkerInfo) -> dict[str, Any]:
    """The fields of a worker, and whether it is alive."""
    started_at = worker.started_at.isoformat() if worker.started_at else None
    parts = [{**asdict(part), "since": part.since.isoformat()} for part in worker.parts]
    return {**asdict(worker), "started_at": started_at, "parts": parts, "alive": worker.is_alive}


def status_json(
    fleet: Fleet, unreadable: Sequence[Problem], aside: Sequence[PutAside] = ()
) -> dict[str, Any]:
    """The content of `status --json`."""
    return {
        "problems": problems_of(fleet, unreadable, aside),
        "workers": [worker_json(worker) for worker in fleet.workers],
        "queues": [asdict(queue) for queue in fleet.queues],
        "agents": [asdict(agent) for agent in fleet.agents],
        "limits": [asdict(limit) for limit in fleet.limits],
        "unreadable": [{**asdict(one), "since": one.since.isoformat()} for one in unreadable],
        "put_aside": [{**asdict(one), "since": one.since.isoformat()} for one in aside],
    }


def _queue_problems(fleet: Fleet) -> Iterator[str]:
    if not any(worker.is_alive for worker in fleet.workers):
        yield "no worker is alive: nothing is executed; start one: openagents-worker worker"
    for queue in fleet.queues:
        if not queue.waiting:
            continue
        problem = why_runs_wait(fleet.workers, queue.name)
        if problem is not None:
            runs = "1 run waits" if queue.waiting == 1 else f"{queue.waiting} runs wait"
            age = (
                f", the oldest for {age_text(queue.oldest_age_ms)}" if queue.oldest_age_ms is not None else ""
            )
            yield f"{runs} in queue {queue.name}{age}: {problem}"


def _agent_problems(fleet: Fleet) -> Iterator[str]:
    alive = [worker for worker in fleet.workers if worker.is_alive]
    if not alive or not all(worker.says_what_it_serves for worker in alive):
        return
    for agent in fleet.agents:
        if not agent.workers:
            yield f"no worker serves the agent {agent.id} (queue {agent.queue}): its runs wait"
        hashes = {worker.definitions[agent.id] for worker in alive if agent.id in worker.definitions}
        if len(hashes) > 1:
            yield f"workers have {len(hashes)} different definitions of the agent {agent.id}"


def _worker_problems(worker: WorkerInfo) -> Iterator[str]:
    if not worker.is_alive:
        if worker.runs:
            runs = "its run" if worker.runs == 1 else f"its {worker.runs} runs"
            yield f"worker {worker.incarnation} is gone, and no other worker has taken over {runs} yet"
    elif worker.loop_lag_ms is not None and worker.loop_lag_ms >= LAG_MS:
        lag = f"{worker.loop_lag_ms / 1000:.1f} s"
        yield f"worker {worker.incarnation}: its event loop was blocked for {lag}; see its log for the cause"
    for part in worker.parts if worker.is_alive else ():
        if part.is_problem:
            since = f"since {part.since:%Y-%m-%d %H:%M:%S} UTC"
            error = f" (last error: {part.code})" if part.code else ""
            problem = f"its part {part.part} is {part.state} {since}{error}"
            yield f"worker {worker.incarnation}: {problem}; see its log"


def _put_aside_problems(aside: Sequence[PutAside]) -> Iterator[str]:
    if aside:
        items = "1 item was" if len(aside) == 1 else f"{len(aside)} items were"
        keys = ", ".join(dict.fromkeys(one.key for one in aside[:MAX_NAMED_KEYS]))
        yield f"{items} put aside, because no worker could read the data: {keys}"


def _record_problems(unreadable: Sequence[Problem]) -> Iterator[str]:
    if unreadable:
        keys = ", ".join(one.key for one in unreadable[:MAX_NAMED_KEYS])
        more = f" and {len(unreadable) - MAX_NAMED_KEYS} more" if len(unreadable) > MAX_NAMED_KEYS else ""
        yield f"{len(unreadable)} stored records cannot be read: {keys}{more}"
