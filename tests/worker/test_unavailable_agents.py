"""Unavailable agents: a worker logs once which agents it cannot serve, and leaves their runs to other
workers.

Redis, both workers and the model's server are real; only one of the workers has the model's key.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.errors import ConfigError
from openagents_worker.local.stack import Stack
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from openagents_worker.testing.model_server import ModelServer
from tests.support.deployment import ROOT, agent, story
from tests.support.waiting import wait_for

PATIENCE_S = 120
KEY = "MODEL_KEY"
RUNS = 6
LINES: list[tuple[str, str]] = []


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Generator[Stack]:
    file = tmp_path_factory.mktemp("unavailable") / "agents.json"
    keyed = agent("keyed", llm={"api_key_env": KEY})
    broken = agent("broken", memory={"type": "bufer"})
    free = agent("free", llm={"provider": "mock"})
    free["llm"] = {"provider": "mock"}
    file.write_text(json.dumps({"agents": [keyed, broken, free]}))
    with ModelServer(lambda asked: {"text": "answered"}).serve_in_thread() as model:
        env = {name: value for name, value in os.environ.items() if name != KEY}
        env |= {
            "MODEL_URL": model.url,
            "OPENAGENTS_CONFIG": str(file),
            "OPENAGENTS_LEASE_MS": "2000",
            "PYTHONPATH": str(ROOT),
        }
        with Stack(env=env, say=lambda name, line: LINES.append((name, line))) as stack:
            stack.start_worker("keyless")
            yield stack


def lines_of(name: str, text: str) -> list[str]:
    return [line for worker, line in list(LINES) if worker == name and text in line]


def request(agent_id: str, number: int = 0) -> dict[str, Any]:
    return {"agent_id": agent_id, "session_id": f"{agent_id}-{number}", "input_text": "Go."}


def test_a_worker_logs_once_which_agents_it_cannot_serve_and_serves_the_others(stack: Stack) -> None:
    """One line with agent, code, place, reason and hint; runs of the other agent are executed."""
    with Client(settings=stack.settings) as client:
        assert client.submit(request("free")).wait(timeout=PATIENCE_S).ok

    lines = lines_of("keyless", "agents_file.agent_not_served")
    assert len(lines) == 2
    [keyed] = [line for line in lines if "keyed" in line]
    assert "plugin.config" in keyed
    assert "agents[0].llm.api_key_env" in keyed
    assert f"{KEY} is not set" in keyed
    assert "restart the worker" in keyed
    [broken] = [line for line in lines if "broken" in line]
    assert "did you mean 'buffer'?" in broken


def test_runs_are_left_to_the_worker_that_has_the_key(stack: Stack) -> None:
    """The worker without the key fails none of them; all complete on the other worker."""
    stack.set_env(**{KEY: "sk-of-the-test"})
    stack.start_worker("keyful")
    with Client(settings=stack.settings) as client:
        handles = [client.submit(request("keyed", number)) for number in range(RUNS)]
        results = [handle.wait(timeout=PATIENCE_S) for handle in handles]
        stories = [story(handle) for handle in handles]

    assert [result.final_output for result in results] == ["answered"] * RUNS
    finished = Counter(str(events[-1].worker).partition("@")[0] for events in stories)
    assert finished == {"keyful": RUNS}
    for events in stories:
        left = [event for event in events if event.name == "run.left_to_others"]
        assert all(str(event.payload["left_by"]).startswith("keyless@") for event in left)
        assert all(event.payload["error_code"] == "agent.unavailable" for event in left)
        assert len(left) <= 1, "one event, whatever the number of claims"


@pytest.mark.long
def test_a_run_that_no_worker_can_execute_says_why(stack: Stack) -> None:
    """It waits for OPENAGENTS_LEFT_TO_OTHERS_MAX_S and then fails with the last worker's reason."""
    with Client(settings=stack.settings) as client:
        redis = client.store.redis
        redis.hset(client.store.keys("agents"), "broken", '{"queue":null,"def_hash":""}')
        handle = client.submit(request("broken"))
        key = client.store.keys("run", handle.id)
        wait_for(lambda: redis.hget(key, "left_count"), "it was left to others", timeout=PATIENCE_S)
        assert client.record(handle.id).state in (RunState.RETRYING, RunState.QUEUED, RunState.RUNNING)
        redis.hset(key, "left_since", "0")  # as if the hour were over
        result = handle.wait(timeout=PATIENCE_S)

    assert result.error_details is not None
    assert result.error_details.code == "agent.unavailable"
    assert "agents[1].memory.type: no memory is named 'bufer'" in result.error_details.message
    assert result.error_details.hint == "did you mean 'buffer'?"


@pytest.mark.long
def test_a_worker_that_can_serve_no_agent_does_not_start(stack: Stack, tmp_path: Path) -> None:
    """It exits with code 2 and lists all errors."""
    file = tmp_path / "agents.json"
    file.write_text(json.dumps({"agents": [agent("a", pattern={"type": "x"}), agent("b", queu="q")]}))
    before = stack.settings.config
    stack.set_env(OPENAGENTS_CONFIG=str(file))
    try:
        with pytest.raises(ConfigError) as caught:
            stack.start_worker("invalid")
    finally:
        stack.set_env(OPENAGENTS_CONFIG=before)

    assert "ended with code 2" in str(caught.value)
    lines = "\n".join(lines_of("invalid", ""))
    assert f"error: config.validation: {file}:" in lines
    assert "agents[0].pattern.type: no pattern is named 'x'" in lines
    assert "agents[1].queu: unknown key; did you mean 'queue'?" in lines
