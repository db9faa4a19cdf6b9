"""Advice about an app's settings. The only place that says which of them make runs slow or hide them.

Nothing of an app that exists is changed by `register`; whoever starts its worker is told once, setting by
setting, what happens and what would be better. The settings of our own app are right already.
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
    """One setting of an app: when it is bad for runs, what happens then, and what is right."""

    setting: str
    is_bad: Callable[[Any], bool]
    """Asked of the worker (Celery's `WorkController`)."""
    effect: str
    right: str


def _our_pool(worker: Any) -> bool:
    return issubclass(worker.pool_cls, TaskPool)


def _on_redis(worker: Any) -> bool:
    return bool(worker.app.connection_for_read().transport.driver_type == "redis")


def _takes_ahead(worker: Any) -> bool:
    """Whether messages of runs are taken that the pool cannot begin; ours has a limit of its own for them."""
    if _our_pool(worker) or (worker.app.conf.worker_disable_prefetch and _on_redis(worker)):
        return False
    return worker.prefetch_multiplier != 1 or _on_redis(worker)


def _orders_wake_ups_last(worker: Any) -> bool:
    """Whether Celery looks into `agents.wake` only when `agents` is empty; our pool's channel does not."""
    order = (worker.app.conf.broker_transport_options or {}).get("queue_order_strategy")
    return _on_redis(worker) and not _our_pool(worker) and order in ("priority", "sorted")


def _hides_queues(worker: Any) -> bool:
    return _on_redis(worker) and bool(
        (worker.app.conf.broker_transport_options or {}).get("global_keyprefix")
    )


ADVICE = (
    Advice(
        "worker_pool",
        lambda worker: not _our_pool(worker),
        "each run occupies a process or a thread while it waits for its model: as many runs at a time as "
        "worker_concurrency says",
        f"worker_pool = {OUR_POOL!r} carries OPENAGENTS_CONCURRENCY runs",
    ),
    Advice(
        "worker_disable_prefetch",
        _takes_ahead,
        "the worker takes messages of runs that it cannot begin; they begin seconds late although another "
        "worker is idle",
        f"worker_pool = {OUR_POOL!r}; or worker_disable_prefetch = True on a Redis broker, "
        "worker_prefetch_multiplier = 1 on another one",
    ),
    Advice(
        "worker_send_task_events",
        lambda worker: not worker.task_events,
        "Flower and `celery events` show no runs",
        "start the worker with -E, or worker_send_task_events = True",
    ),
    Advice(
        "task_send_sent_event",
        lambda worker: not worker.app.conf.task_send_sent_event,
        "Flower does not show a run before a worker takes it",
        "task_send_sent_event = True, in the processes that submit too",
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
        "the worker refuses every message of a run",
        'accept_content contains "json"',
    ),
    Advice(
        "broker_transport_options.queue_order_strategy",
        _orders_wake_ups_last,
        "runs that have begun and go on wait behind all that have not begun",
        "round_robin, Celery's default",
    ),
    Advice(
        "broker_transport_options.global_keyprefix",
        _hides_queues,
        "the queues cannot be read: a run whose message was lost goes on after 5 s, then 10 s, up to 10 min",
        "no prefix, and a Redis database of its own for the broker",
    ),
)


def advise(worker: Any) -> None:
    """Write a warning for each setting of this worker's app that is bad for runs."""
    for advice in ADVICE:
        if advice.is_bad(worker):
            log.warning("app.setting", setting=advice.setting, effect=advice.effect, right=advice.right)


def _accepts_json(accepted: Any) -> bool:
    return bool({"json", "application/json"} & set(accepted or ()))
