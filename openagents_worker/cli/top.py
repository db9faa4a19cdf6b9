"""The output of `top`: what the deployment does at one moment, and what is wrong with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.cli.health import problems_of, queue_table, read_known_fleet, status_json, worker_table
from openagents_worker.cli.lists import run_table
from openagents_worker.cli.terminal import Safe, joined, styled
from openagents_worker.models import RunRecord, RunState
from openagents_worker.producer.client import Client
from openagents_worker.producer.time_text import clock_time
from openagents_worker.store.fleet import Fleet
from openagents_worker.store.listing import Problem

__all__ = ["Snapshot", "SnapshotReader"]

MAX_RUNS = 100
MAX_PROBLEMS = 5
LOOK_FOR_PROBLEMS_S = 30.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Workers, queues and problems, and the newest runs that are executed at this moment.

    `has_more_runs`: older runs were not examined.
    """

    at_ms: int
    fleet: Fleet
    unreadable: Sequence[Problem]
    runs: Sequence[RunRecord]
    has_more_runs: bool = False

    def lines(self) -> list[Safe]:
        """Problems first, then workers, queues and runs."""
        alive = [worker for worker in self.fleet.workers if worker.is_alive]
        waiting = sum(queue.waiting for queue in self.fleet.queues)
        executed = sum(worker.runs for worker in alive)
        head = f"workers {len(alive)} · runs at work {executed} · runs that wait {waiting}"
        lines = [joined(styled(clock_time(self.at_ms), bold=True), head, sep="  ")]
        problems = problems_of(self.fleet, self.unreadable)
        lines += [joined(styled("problem: ", fg="red", bold=True), one) for one in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            lines.append(styled(f"{len(problems) - MAX_PROBLEMS} more: openagents-worker status", dim=True))
        if self.fleet.workers:
            lines += [Safe(""), *worker_table(self.fleet.workers, self.at_ms)]
        lines += [Safe(""), *queue_table(self.fleet.queues)]
        if self.runs:
            lines += [Safe(""), *run_table(self.runs, self.at_ms)]
        if self.has_more_runs:
            lines.append(styled("perhaps more: openagents-worker runs --state running", dim=True))
        return lines

    def to_json(self) -> dict[str, Any]:
        """The content of `status --json`, and the runs."""
        runs = [run.model_dump(mode="json") for run in self.runs]
        return {"at_ms": self.at_ms, **status_json(self.fleet, self.unreadable), "runs": runs}


class SnapshotReader:
    """Reads the state of the deployment from Redis, again and again.

    Every `LOOK_FOR_PROBLEMS_S` seconds, unreadable records are looked for, which reads 1,000 runs completely,
    and queues that no worker announces, which reads the names of all keys.
    """

    def __init__(self, client: Client, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._unreadable: Sequence[Problem] = ()
        self._queues: Sequence[str] = ()
        self._looked_at_s = -LOOK_FOR_PROBLEMS_S

    def read(self) -> Snapshot:
        """The state at this moment. Raises `RedisUnreachable`."""
        client = self._client
        now_s = self._clock()
        looks = now_s - self._looked_at_s >= LOOK_FOR_PROBLEMS_S
        fleet = read_known_fleet(client, None if looks else self._queues)
        page = client.runs(state=[RunState.RUNNING], limit=MAX_RUNS)
        seconds, micros = client.store.ask(lambda redis: redis.time())
        if looks:
            self._unreadable, self._queues = client.problems(), [queue.name for queue in fleet.queues]
            self._looked_at_s = now_s
        at_ms, has_more_runs = round(seconds * 1000 + micros / 1000), page.next_cursor is not None
        return Snapshot(at_ms, fleet, self._unreadable, page.items, has_more_runs)
