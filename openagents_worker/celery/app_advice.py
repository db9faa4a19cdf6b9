"""Advice about an app's settings: the only place that lists which settings make runs slow or invisible.

`register` changes no setting of an existing app. A worker of such an app logs each unsuitable setting once at
its start: the effect, and a suitable value. The settings of our own app are suitable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from openagents_worker.celery.pool.task_pool import TaskPool
from openagents_worker.telemetry.logs import get_logger

__all__ = ["ADVICE", "Advice", "advise"]

log = get_logger(__name__)

OUR_POOL = f"{TaskPool.__module__}:{TaskPool.__name__}"


@dataclass(frozen=True, slots=True)
class Advice:
    """One setting of an app: the test for an unsuitable value, its effect, and a suitable value."""

    setting: str
    is_bad: Callable[[Any], bool]
    """Called with the worker (Celery's `WorkController`)."""
    effect: str
    right: str


def _uses_our_pool(worker: Any) -> bool:
    return issubclass(worker.pool_cls, TaskPool)


def _has_redis_broker(worker: Any) -> bool:
    return bool(worker.app.connection_for_read().transport.driver_type == "redis")


def _prefetches_runs(worker: Any) -> bool:
    """Whether the worker prefetches messages of runs that it cannot start; our pool has its own limit."""
    if _uses_our_pool(worker) or (worker.app.conf.worker_disable_prefetch and _has_redis_broker(worker)):
        return False
    return worker.prefetch_multiplier != 1 or _has_redis_broker(worker)


def _reads_wake_ups_last(worker: Any) -> bool:
    """Whether Celery reads `agents.wake` only when `agents` is empty; the channel of our pool does not."""
    order = (worker.app.conf.broker_transport_options or {}).get("queue_order_strategy")
    return _has_redis_broker(worker) and not _uses_our_pool(worker) and order in ("priority", "sorted")


def _hides_queues(worker: Any) -> bool:
    return _has_redis_broker(worker) and bool(
        (worker.app.conf.broker_transport_options or {}).get("global_keyprefix")
    )


ADVICE = (
    Advice(
        "worker_pool",
        lambda worker: not _uses_our_pool(worker),
        "each run occupies a process or a thread while it waits for its model: the worker executes at most "
        "worker_concurrency runs at a time",
        f"worker_pool = {OUR_POOL!r} executes OPENAGENTS_CONCURRENCY runs at a time",
    ),
    Advice(
        "worker_disable_prefetch",
        _prefetches_runs,
        "the worker prefetches messages of runs that it cannot start; they start seconds late although "
        "another worker is idle",
        f"worker_pool = {OUR_POOL!r}; or worker_disable_prefetch = True on a Redis broker, "
        "worker_prefetch_multiplier = 1 on another one",
    ),
    Advice(
        "worker_send_task_events",
        lambda worker: not worker.task_events,
        "Flower and `celery events` show no runs",
        "start the worker with -E, or set worker_send_task_events = True",
    ),
    Advice(
        "task_send_sent_event",
        lambda worker: not worker.app.conf.task_send_sent_event,
        "Flower does not show a run before a worker receives it",
        "task_send_sent_event = True, also in the processes that submit runs",
    ),
    Advice(
        "worker_enable_remote_control",
        lambda worker: not worker.app.conf.worker_enable_remote_control,
        "`celery inspect` and `celery control`, and so Flower's pages and buttons, do not reach this worker",
        "worker_enable_remote_control = True; `openagents-worker cancel` works in any case",
    ),
    Advice(
        "accept_content",
        lambda worker: not _accepts_json(worker.app.conf.accept_content),
        "the worker rejects every message of a run",
        'accept_content must contain "json"',
    ),
    Advice(
        "broker_transport_options.queue_order_strategy",
        _reads_wake_ups_last,
        "suspended runs that can continue wait behind all runs that have not started",
        "round_robin, the default of Celery",
    ),
    Advice(
        "broker_transport_options.global_keyprefix",
        _hides_queues,
        "the queues cannot be read: a lost message of a run is re-sent after 5 s, then 10 s, up to 10 min",
        "no prefix; use a separate Redis database for the broker",
    ),
)


def advise(worker: Any) -> None:
    """Log a warning for each setting of this worker's app that is unsuitable for runs."""
    for advice in ADVICE:
        if advice.is_bad(worker):
            log.warning("app.setting", setting=advice.setting, effect=advice.effect, right=advice.right)


def _accepts_json(accepted: Any) -> bool:
    return bool({"json", "application/json"} & set(accepted or ()))
