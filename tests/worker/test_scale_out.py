"""Scale-out: an additional worker gets its share of the runs without any configuration."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from openagents_worker import Client, RunRequest
from openagents_worker.local.stack import Stack

SLOTS = 4


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    agents = tmp_path / "agents.json"
    waits = {
        "id": "waits",
        "name": "waits",
        "llm": {"provider": "scripted", "script": [{"text": "done"}], "latency_ms": 300},
        "pattern": {"type": "react"},
        "memory": {"type": "buffer"},
    }
    agents.write_text(json.dumps({"agents": [waits]}))
    return Stack(env={**os.environ, "OPENAGENTS_CONFIG": str(agents), "OPENAGENTS_LOG_LEVEL": "ERROR"})


def runs_per_worker(client: Client, round_id: str, runs: int) -> Counter[str]:
    """The number of runs that each worker has executed in a round, from the events of the runs."""
    request = RunRequest(agent_id="waits", session_id="s", input_text="go")
    handles = [
        client.submit(
            request.model_copy(update={"session_id": f"{round_id}-{n}", "run_id": f"{round_id}-{n}"})
        )
        for n in range(runs)
    ]
    workers: Counter[str] = Counter()
    for handle in handles:
        assert handle.wait(timeout=60).ok
        started = next(event for event in handle.events() if event.name == "run.attempt_started")
        workers[str(started.worker).split("@")[0]] += 1
    return workers


@pytest.mark.long
def test_a_worker_started_later_takes_its_share(stack: Stack) -> None:
    """One worker executes all runs; a second and a third one that start later each execute a fair part."""
    with stack, Client(stack.redis_url) as client:
        stack.start_worker("one", concurrency=SLOTS)
        assert runs_per_worker(client, "first", 2 * SLOTS) == {"one": 2 * SLOTS}

        stack.start_worker("two", concurrency=SLOTS)
        stack.start_worker("three", concurrency=SLOTS)
        runs = 12 * SLOTS
        shares = runs_per_worker(client, "second", runs)

        assert set(shares) == {"one", "two", "three"}
        assert min(shares.values()) >= runs / 3 / 2
