"""The Procfile under honcho: one command starts all there is, and ends it."""

from __future__ import annotations

from pathlib import Path

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.client import Client
from tests.deployment.commands import environment, free_port, running
from tests.deployment.flower import Flower
from tests.support.waiting import wait_for


@pytest.mark.long
def test_honcho_starts_worker_and_flower_and_ends_both(tmp_path: Path) -> None:
    """A run completes and Flower answers; SIGTERM leaves no process behind."""
    nothing = tmp_path / "empty.env"
    nothing.touch()
    with EmbeddedRedis() as redis, Client(redis.url) as client:
        flower = Flower(free_port())
        env = environment(redis.url, FLOWER_PORT=str(flower.port))
        with running(["honcho", "--env", str(nothing), "start"], env, tmp_path) as honcho:
            handle = client.submit({"agent_id": "echo", "session_id": "s", "input_text": "Hello"})
            result = handle.wait(timeout=60)
            wait_for(lambda: flower.get("/healthcheck")[0] == 200, "Flower answers", timeout=60)
            started = len(honcho.left())

            honcho.terminate()

            assert result.final_output == "Echo: Hello (history=0)"
            assert started > 3  # honcho, and at least a worker and a Flower
            wait_for(lambda: not honcho.left(), "no process is left")
            assert "worker.stopped" in honcho.said
