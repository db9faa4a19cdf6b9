"""The worker's app and its start: the consumed queues, and the errors that end a start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu.entity import Queue

from openagents_worker.celery.app import make_worker_app, queues_of
from openagents_worker.celery.bootsteps import _queues_to_consume
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.client import Client
from openagents_worker.producer.publisher import _QueueOfRunRouter, make_app
from openagents_worker.settings import load_settings
from tests.support.waiting import wait_for

AGENT = {
    "id": "echo",
    "name": "Echo",
    "llm": {"provider": "mock"},
    "memory": {"type": "buffer"},
    "pattern": {"type": "react"},
}
CELERY = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-n", "w1@test", "-c", "4"]


@contextmanager
def worker(env: Mapping[str, str], log: Path, *arguments: str) -> Generator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*CELERY, *arguments], env={**os.environ, **env}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def agents_file(tmp_path: Path) -> str:
    path = tmp_path / "agents.json"
    path.write_text(json.dumps({"agents": [AGENT]}))
    return str(path)


def test_the_deployed_application_has_our_tasks() -> None:
    """`celery -A tasks` has them under their public names."""
    import tasks

    assert {"tasks.run_agent", "tasks.resume_run", "tasks.recover_runs", "tasks.prune"} <= set(
        tasks.app.tasks
    )
    assert tasks.run_agent.name == "tasks.run_agent"


def test_a_queue_is_consumed_with_its_wake_ups() -> None:
    """Wake-ups do not wait behind the backlog of new runs."""
    app = make_worker_app(load_settings({"OPENAGENTS_QUEUE": "gpu"}))

    assert [queue.name for queue in app.conf.task_queues] == ["gpu", "gpu.wake"]


@pytest.mark.parametrize(
    "conf",
    [
        {"task_create_missing_queue_type": "quorum"},
        {"task_create_missing_queue_exchange_type": "topic"},
        {"task_create_missing_queues": False, "task_queue_max_priority": 9},
        {"task_queues": [Queue("agents"), Queue("agents.wake", queue_arguments={"x-message-ttl": 1000})]},
    ],
    ids=["quorum queues", "another exchange", "no missing queues", "the app's own declaration"],
)
def test_workers_and_producers_declare_the_queue_of_wake_ups_alike(conf: Mapping[str, Any]) -> None:
    """As Celery declares the other queues of the app: RabbitMQ refuses a second, different declaration."""
    consumer, producer = shop(conf), shop(conf)

    assert _queues_to_consume(consumer, {"agents"}) == ("agents",)

    consumed = consumer.amqp.queues.consume_from["agents.wake"]
    published = _QueueOfRunRouter(producer).route({"queue": "agents.wake"})["queue"]
    assert declaration(consumed) == declaration(published)


@pytest.mark.parametrize("names", [["agents"], ["slow", "agents"]])
def test_our_own_workers_and_producers_declare_queues_alike(names: list[str]) -> None:
    """Also the queues that `--queues` names."""
    settings = load_settings({})
    consumer, producer = make_worker_app(settings), make_app(settings)
    consumer.conf.task_queues = queues_of(names)

    _queues_to_consume(consumer, None)

    for name, consumed in consumer.amqp.queues.consume_from.items():
        published = _QueueOfRunRouter(producer).route({"queue": name})["queue"]
        assert declaration(consumed) == declaration(published)


def shop(conf: Mapping[str, Any]) -> Celery:
    """An app of a team that uses RabbitMQ, with a queue for runs."""
    app = Celery("shop", broker="amqp://guest@127.0.0.1:9//", set_as_current=False)
    app.conf.update({"task_queues": [Queue("agents")], **conf})
    return app


def declaration(queue: Any) -> tuple[object, ...]:
    return queue.name, queue.exchange, queue.routing_key, queue.queue_arguments


def test_our_tasks_have_their_own_settings() -> None:
    """So that they work in an application with other settings."""
    task = make_worker_app(load_settings({})).tasks["tasks.run_agent"]

    assert (task.acks_late, task.ignore_result, task.serializer) == (False, True, "json")


@pytest.mark.slow
def test_an_invalid_agents_file_ends_the_start(tmp_path: Path, redis_url: str) -> None:
    """With a coded error, before a message is consumed."""
    file = tmp_path / "agents.json"
    file.write_text(json.dumps({"agents": [{**AGENT, "pattern": {"type": "reakt"}}]}))
    env = {"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_CONFIG": str(file)}

    with worker(env, tmp_path / "log") as process:
        code = process.wait(60)

    assert code == 2
    log = (tmp_path / "log").read_text()
    assert "plugin.load" in log
    assert "did you mean 'react'" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("redis_options", "env", "says"),
    [
        ({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}, {}, "maxmemory-policy allkeys-lru"),
        ({}, {"OPENAGENTS_DURABILITY": "strict"}, "appendonly is off"),
    ],
    ids=["evicting", "strict, in memory"],
)
def test_a_redis_that_loses_runs_ends_the_start(
    tmp_path: Path, agents_file: str, redis_options: dict[str, str], env: dict[str, str], says: str
) -> None:
    """With a coded error, before a lease is registered or a message is consumed."""
    with EmbeddedRedis(extra=redis_options) as server, Client(server.url) as client:
        env = {**env, "OPENAGENTS_REDIS_URL": server.url, "OPENAGENTS_CONFIG": agents_file}
        with worker(env, tmp_path / "log") as process:
            code = process.wait(60)
        leases = client.store.redis.zcard(client.store.keys("workers"))

    assert (code, leases) == (2, 0)
    log = (tmp_path / "log").read_text()
    assert "error: redis.unsafe" in log
    assert says in log
    assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", "solo", "processes"])
def test_a_run_is_executed_under_every_pool(
    pool: str, tmp_path: Path, agents_file: str, redis_server: EmbeddedRedis, redis_url: str
) -> None:
    """The loop thread works in every pool; a warm shutdown leaves no lease."""
    env = {"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_CONFIG": agents_file}
    with worker(env, tmp_path / "log", "--pool", pool) as process, Client(redis_url) as client:
        store = client.store

        def workers() -> int:
            count: int = store.ask(lambda r: r.zcard(store.keys("workers")))
            return count

        wait_for(workers, "the worker has registered")

        handle = client.submit({"agent_id": "echo", "session_id": "s1", "input_text": "hi"})
        result = handle.wait(timeout=60)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)

        assert str(result.final_output).startswith("Echo: hi")
        assert code == 0, (tmp_path / "log").read_text()
        assert workers() == 0


@pytest.mark.parametrize(("arguments", "slots"), [((), 4), (("--autoscale", "20,3"), 20)])
def test_a_worker_announces_as_many_slots_as_it_can_have(
    tmp_path: Path, agents_file: str, redis_url: str, arguments: tuple[str, ...], slots: int
) -> None:
    """With `--autoscale=20,3` it grows to 20 slots, whatever its concurrency is."""
    env = {"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_CONFIG": agents_file}
    with worker(env, tmp_path / "log", *arguments), Client(redis_url) as client:
        (announced,) = wait_for(client.workers, "the worker has registered")

    assert announced.max_runs == slots


@pytest.mark.slow
def test_a_worker_that_waits_for_redis_can_be_stopped(tmp_path: Path, agents_file: str) -> None:
    """It logs what it waits for, and ends on SIGTERM."""
    env = {"OPENAGENTS_REDIS_URL": "redis://127.0.0.1:1/0", "OPENAGENTS_CONFIG": agents_file}
    log = tmp_path / "log"

    with worker(env, log) as process:
        wait_for(lambda: "redis.away" in log.read_text(), "it logs that Redis is unreachable")
        process.send_signal(signal.SIGTERM)
        process.wait(60)
