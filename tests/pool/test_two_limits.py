"""A registered app in our pool: runs have a separate limit beside the app's `worker_concurrency`."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunState
from openagents_worker.producer.handle import RunHandle
from openagents_worker.producer.waiting_reason import why_runs_wait
from tests.pool.registered import worker
from tests.pool.shopkeeper import PATIENCE_S, Shop, agent, new_tag
from tests.support.proxy import Stalled
from tests.support.waiting import wait_for

RUNS = 20
TASKS = 30  # more than Celery prefetches: two times the prefetch multiplier, four


@pytest.fixture
def url() -> Generator[str]:
    with EmbeddedRedis() as server:
        yield server.url


def submit(shop: Shop, agent_id: str) -> RunHandle[Any]:
    return shop.client.submit({"agent_id": agent_id, "session_id": new_tag(), "input_text": "hi"})


def in_flight(handles: list[RunHandle[Any]]) -> int:
    return sum(handle.record().state is RunState.RUNNING for handle in handles)


@pytest.mark.share(of=3)
@pytest.mark.parametrize(
    "conf",
    [{}, {"worker_disable_prefetch": True}, {"worker_prefetch_multiplier": 1, "task_acks_late": True}],
    ids=["Celery's defaults", "no prefetch", "late acknowledgement"],
)
def test_runs_and_the_apps_own_tasks_have_separate_limits(
    tmp_path: Path, url: str, conf: dict[str, Any]
) -> None:
    """Twenty runs wait for their models while two tasks of thirty run; neither blocks the other."""
    with worker(tmp_path, url, "celery,agents", conf) as shop:
        tags, until = [new_tag() for _ in range(TASKS)], new_tag()
        for tag in tags:
            shop.app.send_task("tests.pool.mixed.blocks", (tag, until), queue="celery")
        wait_for(lambda: begun(shop, tags) == 2, "two tasks have started", PATIENCE_S)

        waiting = [submit(shop, "waiter") for _ in range(RUNS)]
        wait_for(lambda: in_flight(waiting) == RUNS, "all runs are in flight", PATIENCE_S)
        answered = submit(shop, "greeter").wait(PATIENCE_S)

        assert answered.final_output == "hello"
        wait_for(
            lambda: shop.stats()["pool"]["runs"]["running"] == RUNS, "the completed run is gone", PATIENCE_S
        )
        stats = shop.stats()["pool"]
        assert begun(shop, tags) == 2
        assert (stats["max-concurrency"], stats["runs"]["limit"]) == (2, 500)
        queues = {queue["name"] for queue in shop.tell("active_queues")}
        assert queues == {"celery", "agents", "agents.wake"}
        shop.redis.rpush(f"notes:{until}", "may end")
        wait_for(lambda: begun(shop, tags) == TASKS, "all tasks have started", PATIENCE_S)
        assert in_flight(waiting) == RUNS


def begun(shop: Shop, tags: list[str]) -> int:
    return sum(bool(shop.notes(tag)) for tag in tags)


def test_without_a_lease_runs_are_left_in_the_broker_and_tasks_are_not(tmp_path: Path, url: str) -> None:
    """The worker cannot reach the Redis of the runs for longer than its lease, but it can reach its
    broker."""
    with (
        Stalled(url) as lines,
        worker(tmp_path, url, "celery,agents", {}, OPENAGENTS_REDIS_URL=lines.url) as shop,
    ):
        lines.stall()
        wait_for(lambda: "worker.let_go" in shop.log, "the lease is over", PATIENCE_S)

        waiting, tags, until = [submit(shop, "greeter") for _ in range(5)], [new_tag()], new_tag()
        shop.app.send_task("tests.pool.mixed.blocks", (tags[0], until), queue="celery")
        wait_for(lambda: begun(shop, tags) == 1, "a task of the app is received", PATIENCE_S)
        shop.redis.rpush(f"notes:{until}", "may end")
        # The blocking command that was sent before the end of the lease may still return one.
        assert shop.in_broker("agents") >= len(waiting) - 1

        lines.go_on()
        assert {handle.wait(PATIENCE_S).final_output for handle in waiting} == {"hello"}


def test_runs_respect_their_limit(tmp_path: Path, url: str) -> None:
    """`OPENAGENTS_CONCURRENCY`: further runs wait in the broker, where any worker can receive them."""
    with worker(tmp_path, url, "agents", {}, OPENAGENTS_CONCURRENCY="3") as shop:
        waiting = [submit(shop, "waiter") for _ in range(10)]
        wait_for(lambda: in_flight(waiting) == 3, "three runs are in flight", PATIENCE_S)
        wait_for(lambda: shop.in_broker("agents") == 7, "the others are in the broker", PATIENCE_S)

        waiting[0].cancel()
        running = [handle for handle in waiting if handle.record().state is RunState.RUNNING]
        for handle in running:
            handle.cancel()

        wait_for(lambda: shop.in_broker("agents") <= 4, "the next runs are received", PATIENCE_S)
        wait_for(lambda: in_flight(waiting) == 3, "the next runs are in flight", PATIENCE_S)


def test_a_worker_announces_the_limit_of_its_runs(tmp_path: Path, url: str) -> None:
    """`OPENAGENTS_CONCURRENCY`, not the app's `worker_concurrency`: with one run, the worker is not full."""
    with worker(tmp_path, url, "agents", {"worker_concurrency": 1}, OPENAGENTS_CONCURRENCY="3") as shop:
        waiting = submit(shop, "waiter")
        wait_for(lambda: in_flight([waiting]) == 1, "the run is in flight", PATIENCE_S)

        (announced,) = shop.client.workers()
        assert announced.max_runs == 3
        assert why_runs_wait([announced], "agents") is None


def test_remote_control_of_queues_works_for_both(tmp_path: Path, url: str) -> None:
    """`cancel_consumer` and `add_consumer` also work for a queue of runs that was named at the start."""
    painter = {**agent("painter", {"text": "red"}), "queue": "gpu"}
    with worker(tmp_path, url, "celery,agents", {}, painter) as shop:
        shop.tell("cancel_consumer", queue="agents")
        handle = submit(shop, "greeter")
        tag = new_tag()
        shop.app.send_task("tests.pool.mixed.blocks", (tag, tag), queue="celery")
        wait_for(lambda: begun(shop, [tag]), "the app's own task is received", PATIENCE_S)
        assert handle.record().state is RunState.QUEUED

        shop.tell("add_consumer", queue="agents")
        shop.tell("add_consumer", queue="more")

        assert handle.wait(PATIENCE_S).final_output == "hello"
        other = new_tag()
        shop.app.send_task("tests.pool.mixed.blocks", (other, other), queue="more")
        wait_for(lambda: begun(shop, [other]), "a queue of the app is added", PATIENCE_S)
        assert "add gpu to -Q and restart the worker" in shop.tell("add_consumer", queue="gpu")["error"]


def test_a_worker_logs_each_unsuitable_setting_once(tmp_path: Path, url: str) -> None:
    """With its effect and a suitable value."""
    with worker(tmp_path, url, "celery,agents", {}) as shop:
        wait_for(lambda: "app.setting" in shop.log, "the warning is logged", PATIENCE_S)
        lines = [line for line in shop.log.splitlines() if "app.setting" in line]

    assert len(lines) == 2
    assert "setting=worker_send_task_events" in lines[0]
    assert "start the worker with -E" in lines[0]
    assert "setting=task_send_sent_event" in lines[1]


def test_a_worker_that_executes_no_runs_logs_no_warning(tmp_path: Path, url: str) -> None:
    """Its settings do not affect runs."""
    with worker(tmp_path, url, "celery", {}) as shop:
        assert "app.setting" not in shop.log


@pytest.mark.parametrize("own", [{}, {"PRODUCT_LOG": "1"}], ids=["Celery's log", "the product's log"])
def test_the_log_settings_apply_in_a_registered_app(tmp_path: Path, url: str, own: dict[str, str]) -> None:
    """`OPENAGENTS_LOG_LEVEL` and `_LEVELS` apply to our lines, whatever handler writes them."""
    levels = {
        "OPENAGENTS_LOG_LEVEL": "ERROR",
        "OPENAGENTS_LOG_LEVELS": "openagents_worker.celery.app_advice=WARNING",
    }
    with worker(tmp_path, url, "celery,agents", {}, **levels, **own) as shop:
        assert submit(shop, "greeter").wait(PATIENCE_S).final_output == "hello"
        log = shop.log

    assert "worker.registered" not in log
    assert "app.setting" in log
    assert "Task tasks.run_agent" in log, "Celery's lines are unchanged"
    assert ("product's WARNING openagents_worker.celery.app_advice app.setting" in log) is bool(own)


@pytest.mark.long
def test_both_channels_are_restored_after_a_lost_connection(tmp_path: Path, url: str) -> None:
    """Redis closes all connections of the worker while runs wait; then runs and tasks are received again."""
    with worker(tmp_path, url, "celery,agents", {"worker_disable_prefetch": True}) as shop:
        waiting = [submit(shop, "waiter") for _ in range(3)]
        wait_for(lambda: in_flight(waiting) == 3, "runs are in flight", PATIENCE_S)

        shop.redis.client_kill_filter(_type="normal", skipme=True)
        wait_for(lambda: "Connection to broker lost" in shop.log, "the worker detects it", PATIENCE_S)

        tag = new_tag()
        shop.app.send_task("tests.pool.mixed.blocks", (tag, tag), queue="celery")
        assert submit(shop, "greeter").wait(PATIENCE_S).final_output == "hello"
        wait_for(lambda: begun(shop, [tag]), "the app's own task is received", PATIENCE_S)
        assert shop.stats()["pool"]["runs"]["limit"] == 500
