"""Figures: the only place that counts what the whole fleet does, for metrics.

The number of commands is bounded: no key is scanned, and of each queue only the oldest messages are read.
States without a count in Redis are left out: runs that wait for their session, and parked runs without a
time-out.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.jsontext import loads
from openagents_worker.store.approvals import INDEX as APPROVALS
from openagents_worker.store.client import Plan
from openagents_worker.store.fleet import WorkerInfo, message_age_ms, read_workers
from openagents_worker.store.keys import Keys
from openagents_worker.store.limits import LimitInfo, read_limits
from openagents_worker.store.permission import is_permission_error
from openagents_worker.store.redis_errors import default_if_wrong_type

__all__ = ["Figures", "QueueFigures", "read_figures"]

MAX_QUEUES = 100
MAX_CHECKED_MESSAGES = (
    20  # the oldest of a queue: those of ended runs only wait for the notification of Celery
)


@dataclass(frozen=True, slots=True)
class QueueFigures:
    """A queue of runs. `oldest_age_ms` is the longest wait for a worker, 0 if no run waits."""

    name: str
    waiting: int
    oldest_age_ms: int
    workers: int
    resent: int


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of the fleet at one moment. `due` counts delayed runs and runs before a retry, `timeouts`
    parked runs with a time-out, and `put_aside` items that no worker could read.

    `may_read_runs` is whether Redis lets this user read records of runs; None: none was to be read.
    """

    workers: tuple[WorkerInfo, ...]
    queues: tuple[QueueFigures, ...]
    limits: tuple[LimitInfo, ...]
    due: int
    timeouts: int
    approvals: int
    put_aside: int
    may_read_runs: bool | None = None

    @property
    def running(self) -> int:
        """The runs that workers own, dead workers included."""
        return sum(worker.runs for worker in self.workers)


def read_figures(keys: Keys, default_queue: str, may_read_runs: bool | None = None) -> Plan[Figures]:
    """A plan that returns the figures. `default_queue` is the queue of agents without a queue.

    `may_read_runs` is that of the previous figures: Redis logs each command that it refuses, so a user that
    may not read runs is refused once.
    """
    workers = yield from read_workers(keys)

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        pipeline.time()
        pipeline.zcard(keys("due"))
        pipeline.zcard(keys("timeouts"))
        pipeline.zcard(keys("index", APPROVALS))
        pipeline.llen(keys("aside"))
        pipeline.hgetall(keys("agents"))
        pipeline.hgetall(keys("sent_again"))
        return pipeline.execute(raise_on_error=False)

    clock, *answers = yield question
    seconds, micros = default_if_wrong_type(clock, (0, 0))
    due, timeouts, approvals, aside = (default_if_wrong_type(answer, 0) for answer in answers[:4])
    agents, resent = (default_if_wrong_type(answer, {}) for answer in answers[4:])
    names = _queue_names(default_queue, workers, agents)
    counted = yield from _count_queues(keys, names)
    run_ids = [run_id for _, oldest in counted for run_id, _ in oldest]
    ended, may_read_runs = yield from _read_ended(keys, run_ids, may_read_runs)
    now_us = seconds * 1_000_000 + micros
    queues = tuple(
        _queue_figures(name, count, oldest, ended, workers, _count(resent.get(name)), now_us=now_us)
        for name, (count, oldest) in zip(names, counted, strict=True)
    )
    limits = yield from read_limits(keys)
    return Figures(workers, queues, limits, due, timeouts, approvals, aside, may_read_runs)


def _queue_names(
    default_queue: str, workers: Sequence[WorkerInfo], announced: Mapping[str, str]
) -> list[str]:
    """The queues that workers consume, and those of the agents that workers have announced."""
    names = {default_queue, *(queue for worker in workers for queue in worker.queues)}
    for text in announced.values():
        try:
            queue = loads(text).get("queue")
        except (ValueError, AttributeError):
            continue
        if isinstance(queue, str) and queue:
            names.add(queue)
    return sorted(names)[:MAX_QUEUES]


Messages = Sequence[tuple[str, float]]
"""Ids of runs, each with the time at which its message was sent, in microseconds since 1970."""


def _count_queues(keys: Keys, names: Sequence[str]) -> Plan[list[tuple[int, Messages]]]:
    """A plan that returns the number of messages of each queue, and the oldest of them."""

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.zcard(keys("sent", name))
            pipeline.zrange(keys("sent", name), 0, MAX_CHECKED_MESSAGES - 1, withscores=True)
        return pipeline.execute(raise_on_error=False)

    answers = yield question
    return [
        (default_if_wrong_type(count, 0), default_if_wrong_type(oldest, []))
        for count, oldest in zip(answers[::2], answers[1::2], strict=True)
    ]


def _queue_figures(
    name: str,
    count: int,
    oldest: Messages,
    ended: Container[str],
    workers: Sequence[WorkerInfo],
    resent: int,
    *,
    now_us: int,
) -> QueueFigures:
    waiting = count - sum(run_id in ended for run_id, _ in oldest)
    since_us = next((at_us for run_id, at_us in oldest if run_id not in ended), None)
    if since_us is None and waiting > 0:  # only ended runs were read
        since_us = oldest[-1][1]
    age_ms = 0 if since_us is None else message_age_ms(since_us, now_us)
    serving = sum(worker.serves(name) for worker in workers)
    return QueueFigures(name, max(waiting, 0), age_ms, serving, resent)


def _read_ended(
    keys: Keys, run_ids: Sequence[str], may_read: bool | None
) -> Plan[tuple[set[str], bool | None]]:
    """A plan that returns the runs that have ended, and of which Celery has not been notified yet.

    Those that a Redis user may not read count as waiting: Flower's user sees no data of runs. While it is not
    known whether the user may read them, one run is read before the others. The plan returns what is known
    afterwards.
    """
    answers: list[Any] = []
    if run_ids and may_read is None:
        answers = yield _read_notifications(keys, run_ids[:1])
        may_read = not is_permission_error(answers[0])
    if may_read and (others := run_ids[len(answers) :]):
        answers += yield _read_notifications(keys, others)
        may_read = not any(map(is_permission_error, answers))
    return {run_id for run_id, pending in zip(run_ids, answers, strict=False) if pending == "1"}, may_read


def _read_notifications(keys: Keys, run_ids: Sequence[str]) -> Any:
    """For each run: "1" if it has ended, and Celery has not been notified."""

    def question(client: Any) -> Any:
        pipeline = client.pipeline(transaction=False)
        for run_id in run_ids:
            pipeline.hget(keys("run", run_id), "untold")
        return pipeline.execute(raise_on_error=False)

    return question


def _count(text: Any) -> int:
    try:
        return max(int(text), 0)
    except (TypeError, ValueError):
        return 0
