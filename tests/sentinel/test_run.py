"""Runs on a Redis that sentinels watch: its master dies under them, and they go on."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from openagents_worker import Client
from openagents_worker.errors import ConfigError, OpenAgentsError, RedisUnreachable
from openagents_worker.events import RunEvent
from openagents_worker.local.child_process import ChildProcess
from openagents_worker.local.stack import Stack
from openagents_worker.producer.handle import RunHandle
from openagents_worker.store.ttl import ttl_violations
from tests.sentinel.tools import let_go
from tests.sentinel.watched import Watched
from tests.support import diary
from tests.support.deployment import ROOT, call
from tests.support.waiting import PATIENCE_S, wait_for

GARBAGE = ("garbage", "[1, 2]", '{"properties": {}}')


@pytest.fixture
def stack(watched: Watched, tmp_path: Path) -> Generator[Stack]:
    holder = {
        "id": "holder",
        "name": "holder",
        "llm": {
            "provider": "scripted",
            "script": [{"tool_calls": [call("hold")]}, {"text": "done"}],
        },
        "pattern": {"type": "react"},
        "memory": {"type": "buffer"},
        "tools": [{"id": "hold", "impl": "tests.sentinel.tools.hold"}],
    }
    (tmp_path / "agents.json").write_text(json.dumps({"agents": [holder]}))
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        diary.DIARY: str(tmp_path),
        "OPENAGENTS_CONFIG": str(tmp_path / "agents.json"),
    }
    with Stack(redis_url=watched.url, env=env) as stack:
        yield stack
    assert ttl_violations(watched.data_url) == []


@pytest.fixture
def worker(stack: Stack) -> ChildProcess:
    return stack.start_worker("worker")


@pytest.fixture
def client(stack: Stack) -> Generator[Client]:
    with Client(settings=stack.settings) as client:
        yield client


def submit(client: Client, session_id: str) -> RunHandle[Any]:
    """A producer that tries again as long as it is told that this may help."""

    def accepted() -> RunHandle[Any] | None:
        try:
            return client.submit({"agent_id": "holder", "session_id": session_id, "input_text": "Go."})
        except OpenAgentsError as error:
            if not error.retryable:
                raise
            return None

    return wait_for(accepted, "it is accepted", timeout=PATIENCE_S)


def test_a_run_goes_on_when_the_master_dies_in_the_middle_of_a_call(
    watched: Watched, worker: ChildProcess, client: Client, tmp_path: Path
) -> None:
    """Its call is made once, its worker is the same, and new runs are accepted and carried as before."""
    run = submit(client, "before")
    wait_for(lambda: diary.read(tmp_path, run.id), "the tool has begun", timeout=PATIENCE_S)

    seen: list[RunEvent] = []
    with ThreadPoolExecutor() as beside:
        watching = beside.submit(lambda: [seen.append(event) for event in run.events()])
        wait_for(lambda: seen, "it is watched")
        killed = watched.kill_master()
        meanwhile = submit(client, "meanwhile")
        let_go(tmp_path)
        watching.result()

    stored = [event.seq for event in seen if event.seq is not None]
    assert stored == list(range(1, len(stored) + 1))
    assert seen[-1].final
    assert run.wait(timeout=PATIENCE_S).final_output == "done"
    assert meanwhile.wait(timeout=PATIENCE_S).final_output == "done"
    assert [line["what"] for line in diary.read(tmp_path, run.id)] == ["begin", "end"]
    assert worker.exit_code is None
    assert watched.master.client.keys("oa:gone:*") == [], "no look at the new master gave the worker up"
    watched.bring_back(killed)


def test_items_that_are_no_messages_stop_no_worker_here_either(
    watched: Watched, worker: ChildProcess, client: Client, tmp_path: Path
) -> None:
    """A broker behind sentinels has our transport, as every Redis has."""
    let_go(tmp_path)
    watched.master.client.lpush("agents", *GARBAGE)

    assert submit(client, "after").wait(timeout=PATIENCE_S).ok
    assert worker.exit_code is None
    assert sum("message.unreadable" in line for line in worker.lines) == len(GARBAGE)
    assert watched.master.client.exists("unacked", "unacked_index") == 0


def test_a_worker_outlives_a_master_that_becomes_a_replica(
    watched: Watched, worker: ChildProcess, client: Client, tmp_path: Path
) -> None:
    """It waits for messages there when it is told that there is nothing to wait for any more."""
    let_go(tmp_path)
    former = watched.master
    watched.fail_over()
    watched.make_replica(former)

    assert submit(client, "after").wait(timeout=PATIENCE_S).ok
    assert worker.exit_code is None


def test_a_worker_outlives_a_master_that_has_too_few_replicas(
    watched: Watched, worker: ChildProcess, client: Client, tmp_path: Path
) -> None:
    """Nothing is accepted meanwhile, and a producer may try again; then all goes on."""
    let_go(tmp_path)
    refusal = "NOREPLICAS"  # said by a worker that had connected, and by one that had not yet
    for node in watched.nodes:  # both: a slow machine may have the master replaced meanwhile
        node.client.config_set("min-replicas-to-write", 2)
    try:
        with pytest.raises(RedisUnreachable, match=refusal):
            client.submit({"agent_id": "holder", "session_id": "s", "input_text": "Go."})
        wait_for(
            lambda: any(refusal in line for line in worker.lines), "the worker is refused", timeout=PATIENCE_S
        )
    finally:
        for node in watched.nodes:
            node.client.config_set("min-replicas-to-write", 0)

    assert submit(client, "after").wait(timeout=PATIENCE_S).ok
    assert worker.exit_code is None


def test_a_master_that_would_throw_runs_away_is_refused(watched: Watched, stack: Stack) -> None:
    """The sentinels are not asked how it keeps what is written, the master is."""
    master = watched.master.client
    master.config_set("maxmemory", "100mb", "maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigError, match="ended with code") as caught:
            stack.start_worker("worker")
    finally:
        master.config_set("maxmemory", "0", "maxmemory-policy", "noeviction")

    assert "redis.unsafe" in str(caught.value)
