"""Advice about an app's settings: one warning for each setting that makes runs slow or invisible."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.concurrency.thread import TaskPool as ThreadPool

from openagents_worker.celery.app import make_worker_app
from openagents_worker.celery.app_advice import ADVICE
from openagents_worker.celery.pool.task_pool import TaskPool
from openagents_worker.settings import load_settings
from openagents_worker.worker.backlog import priorities_are_kombus

GOOD = {"worker_send_task_events": True, "task_send_sent_event": True}
AMQP = "amqp://127.0.0.1"
REDIS = "redis://127.0.0.1"


def bad_settings(app: Celery, pool: type = TaskPool) -> set[str]:
    """The settings about which a worker of the app is warned, read as Celery's `WorkController` reads
    them."""
    worker = SimpleNamespace(
        app=app,
        pool_cls=pool,
        task_events=app.conf.worker_send_task_events,
        prefetch_multiplier=app.conf.worker_prefetch_multiplier,
    )
    return {advice.setting for advice in ADVICE if advice.is_bad(worker)}


def warned(broker: str = REDIS, pool: type = TaskPool, **conf: Any) -> set[str]:
    with Celery("shop", broker=broker, set_as_current=False) as app:
        app.conf.update(conf)
        return bad_settings(app, pool)


@pytest.mark.parametrize(
    ("broker", "pool", "conf", "bad"),
    [
        (REDIS, TaskPool, {}, set()),
        (AMQP, TaskPool, {"worker_prefetch_multiplier": 10}, set()),
        (REDIS, PreforkPool, {"worker_disable_prefetch": True}, {"worker_pool"}),
        (REDIS, PreforkPool, {"worker_prefetch_multiplier": 1}, {"worker_pool", "worker_disable_prefetch"}),
        (AMQP, ThreadPool, {"worker_prefetch_multiplier": 1}, {"worker_pool"}),
        (AMQP, ThreadPool, {"worker_disable_prefetch": True}, {"worker_pool", "worker_disable_prefetch"}),
        (REDIS, TaskPool, {"worker_send_task_events": False}, {"worker_send_task_events"}),
        (REDIS, TaskPool, {"task_send_sent_event": False}, {"task_send_sent_event"}),
        (REDIS, TaskPool, {"worker_enable_remote_control": False}, {"worker_enable_remote_control"}),
        (REDIS, TaskPool, {"accept_content": ["pickle"]}, {"accept_content"}),
        (REDIS, TaskPool, {"accept_content": ["application/json"]}, set()),
        (
            REDIS,
            PreforkPool,
            {
                "worker_disable_prefetch": True,
                "broker_transport_options": {"queue_order_strategy": "priority"},
            },
            {"worker_pool", "broker_transport_options.queue_order_strategy"},
        ),
        (REDIS, TaskPool, {"broker_transport_options": {"queue_order_strategy": "sorted"}}, set()),
        (
            REDIS,
            TaskPool,
            {"broker_transport_options": {"global_keyprefix": "x"}},
            {"broker_transport_options.global_keyprefix"},
        ),
        (REDIS, TaskPool, {"task_acks_late": True, "worker_hijack_root_logger": True}, set()),
        (
            REDIS,
            TaskPool,
            {"worker_cancel_long_running_tasks_on_connection_loss": True, "broker_pool_limit": 0},
            set(),
        ),
        (REDIS, TaskPool, {"worker_max_tasks_per_child": 1, "task_default_rate_limit": "1/h"}, set()),
    ],
)
def test_a_setting_that_is_bad_for_runs_is_named(
    broker: str, pool: type, conf: dict[str, Any], bad: set[str]
) -> None:
    """A setting without an effect on runs is not reported."""
    assert warned(broker, pool, **{**GOOD, **conf}) == bad


def test_every_advice_is_tested_above() -> None:
    """Each has an effect and a suitable value."""
    assert len({advice.setting for advice in ADVICE}) == len(ADVICE) == 8
    assert all(advice.effect and advice.right for advice in ADVICE)


def test_our_own_app_needs_no_advice() -> None:
    """All of its settings are suitable."""
    with make_worker_app(load_settings({"OPENAGENTS_REDIS_URL": REDIS})) as app:
        assert bad_settings(app) == set()


def test_celerys_defaults_in_our_pool_hide_something_only_from_flower() -> None:
    """The warnings for an app with default settings and our pool."""
    assert warned() == {"worker_send_task_events", "task_send_sent_event"}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, True),
        ({"priority_steps": [0, 3]}, True),
        ({"priority_steps": list(range(10))}, False),
        ({"sep": ":"}, False),
    ],
)
def test_queues_with_other_key_names_are_not_read(options: dict[str, Any], found: bool) -> None:
    """Otherwise a waiting message would count as lost and be re-sent repeatedly."""
    assert priorities_are_kombus(options) is found
