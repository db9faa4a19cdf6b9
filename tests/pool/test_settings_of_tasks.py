"""Hostile task settings of an app: with each setting at its worst value, runs are still executed."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, Task
from celery.app.defaults import NAMESPACES

from openagents_worker import register
from openagents_worker.producer.client import client_of
from tests.pool.registered import worker
from tests.pool.shopkeeper import PATIENCE_S, agent, new_tag
from tests.support.waiting import wait_for

ALL_TASKS = {
    "rate_limit": "1/h",
    "time_limit": 0.01,
    "soft_time_limit": 0.01,
    "acks_late": True,
    "serializer": "pickle",
    "expires": 0.001,
    "priority": 9,
    "max_retries": 0,
    "send_events": False,
    "routing_key": "elsewhere",
    "compression": "zlib",
    "throws": [],
    "track_started": True,
}

SLOW = agent("slow", {"error": "rate_limit", "retry_after_ms": 10}, {"text": "done", "latency_ms": 100})
SLOW["llm"]["retry"] = {"max_attempts": 12, "suspend_above_ms": 0}

HOSTILE: dict[str, Any] = {
    "acks_late": True,
    "acks_on_failure_or_timeout": False,
    "acks_on_failure": False,
    "acks_on_timeout": False,
    "annotations": {"*": ALL_TASKS},
    "compression": "zlib",
    "create_missing_queues": False,
    "create_missing_queue_type": "quorum",
    "create_missing_queue_exchange_type": "topic",
    "inherit_parent_priority": True,
    "default_delivery_mode": 1,
    "default_queue": "low",
    "default_queue_type": "quorum",
    "default_exchange": "shop",
    "default_exchange_type": "topic",
    "default_routing_key": "shop.#",
    "default_rate_limit": "1/h",
    "default_priority": 9,
    "eager_propagates": True,
    "ignore_result": True,
    "store_eager_result": True,
    "publish_retry": False,
    "publish_retry_policy": {"max_retries": 0},
    "queues": {"low": {}, "agents": {}},
    "queue_max_priority": 3,
    "reject_on_worker_lost": True,
    "retry_on_worker_lost": True,
    "remote_tracebacks": True,
    "repr_maxlevels": 0,
    "routes": {"*": {"queue": "low"}},
    "send_sent_event": True,
    "serializer": "yaml",
    "soft_time_limit": 0.01,
    "time_limit": 0.02,
    "store_errors_even_if_ignored": True,
    "track_started": True,
    "allow_error_cb_on_chord_header": True,
}
APART = {
    "always_eager": "tests/celery/test_eager.py: there is no worker then",
    "protocol": "below: messages of Celery 3 hold no chains",
}
CONF = {f"task_{name}": value for name, value in HOSTILE.items()}


def test_every_task_setting_of_celery_is_tested() -> None:
    """A new version of Celery may add one."""
    assert set(NAMESPACES["task"]) == HOSTILE.keys() | APART.keys()


@pytest.fixture
def apps(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Generator[tuple[Celery, Celery]]:
    """An app with Celery's defaults, and one with all hostile settings."""
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", redis_url)
    plain, hostile = (Celery(name, broker=redis_url, set_as_current=False) for name in ("plain", "hostile"))
    hostile.conf.update(CONF)
    for app in (plain, hostile):
        register(app)
    yield plain, hostile
    for app in (plain, hostile):
        client_of(app).close()
        app.close()


@pytest.mark.parametrize("name", ["run_agent", "resume_run", "recover_runs", "prune"])
def test_no_setting_changes_our_tasks(apps: tuple[Celery, Celery], name: str) -> None:
    """Except for results, which belong to the app."""
    plain, hostile = (app.tasks[f"tasks.{name}"] for app in apps)
    names = {attribute for attribute, _ in Task.from_config} | ALL_TASKS.keys()

    changed = {each for each in names if getattr(plain, each, None) != getattr(hostile, each, None)}

    assert changed <= {"ignore_result", "store_eager_result", "priority"}


@pytest.mark.parametrize("pool", ["ours", "prefork"])
def test_a_run_is_executed_with_all_hostile_settings(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, pool: str
) -> None:
    """It waits for its model, is retried, is followed by another run, and leaves no message."""
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", redis_url)
    conf = {**CONF, **({"worker_pool": "processes"} if pool == "prefork" else {})}
    with (
        worker(tmp_path, redis_url, "low,agents", conf, SLOW) as shop,
        Celery("producer", broker=redis_url, backend=redis_url, set_as_current=False) as app,
    ):
        app.conf.update(CONF)
        run = register(app)
        request = {"agent_id": "slow", "session_id": new_tag(), "input_text": "hi"}
        second = {**request, "session_id": new_tag()}

        last = (run.s(request) | run.si(second)).apply_async(expires=PATIENCE_S)

        assert last.get(timeout=PATIENCE_S)["final_output"] == "done"
        first = last.parent.record()
        assert (first.attempt, first.queue) == (2, "agents")
        wait_for(lambda: shop.redis.keys("agents*") == [], "no message is left", PATIENCE_S)
        client_of(app).close()


def test_a_run_is_executed_with_message_protocol_1(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`task_protocol = 1` has no chains; a single run needs no feature of version 2."""
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", redis_url)
    conf = {"task_protocol": 1}
    with (
        worker(tmp_path, redis_url, "agents", conf, SLOW),
        Celery("producer", broker=redis_url, backend=redis_url, set_as_current=False) as app,
    ):
        app.conf.update(conf)
        handle = register(app).delay({"agent_id": "slow", "session_id": new_tag(), "input_text": "hi"})

        assert handle.get(timeout=PATIENCE_S)["final_output"] == "done"
        assert handle.record().attempt == 2
        client_of(app).close()
