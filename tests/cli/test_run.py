"""`run`: its notice while a run waits, and Ctrl-C. The command is a separate process, to receive signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from openagents_worker.cli.exits import Exit
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from tests.cli.conftest import Command, register, retire
from tests.support.waiting import PATIENCE_S

COMMAND = [sys.executable, "-m", "openagents_worker.cli"]


@contextmanager
def running(url: str, *arguments: str) -> Generator[subprocess.Popen[str]]:
    env = {**os.environ, "OPENAGENTS_REDIS_URL": url}
    with subprocess.Popen(
        [*COMMAND, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_with(process: subprocess.Popen[str], word: str) -> str:
    assert process.stderr is not None
    return next(line for line in process.stderr if word in line)


@pytest.mark.long
def test_a_run_that_no_worker_starts_is_explained(redis_url: str, client: Client) -> None:
    """After three seconds, and again when the reason changes. Ctrl-C ends the command, but not the run."""
    with running(redis_url, "run", "echo", "hi", "--run-id", "r1") as process:
        first = line_with(process, "waiting:")
        register(client, agents=("other",))
        second = line_with(process, "waiting:")
        process.send_signal(signal.SIGINT)
        goodbye = line_with(process, "continues")
        process.wait(60)

    assert "no worker serves queue agents" in first
    assert "no worker of queue agents has the agent echo: their agents are other" in second
    assert "openagents-worker watch r1" in goodbye
    assert process.returncode == 130
    assert client.record("r1").state is RunState.QUEUED
    client.cancel("r1")
    retire(client)


@pytest.mark.long
def test_a_run_whose_redis_dies_can_be_watched_again() -> None:
    """The command ends with the error, and says how to go on."""
    with EmbeddedRedis() as server, running(server.url, "run", "echo", "hi", "--run-id", "r1") as process:
        line_with(process, "run.queued")
        os.kill(server.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE_S)

    assert "the run continues when Redis is back" in said
    assert "openagents-worker watch r1" in said
    assert "redis.unreachable" in said
    assert process.returncode == Exit.NO_REDIS


def test_a_closed_pipe_is_a_success(redis_url: str, client: Client) -> None:
    """As with `openagents-worker runs | head -1`."""
    for number in range(50):
        client.submit(
            {"agent_id": "a", "session_id": f"s{number}", "input_text": "x", "run_id": f"r{number}"}
        )
    with running(redis_url, "runs", "--limit", "50") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
        process.wait(60)
    for number in range(50):
        client.cancel(f"r{number}")

    assert (process.returncode, errors) == (0, "")


def test_the_options_of_run_are_part_of_the_request(command: Command, client: Client) -> None:
    """Tenant, labels, limits and queue."""
    options = ["--tenant", "acme", "--label", "env=prod", "--budget", "max_steps=3", "--queue", "slow"]
    options += ["--on-busy", "interrupt"]

    done = command("run", "echo", "hi", "--run-id", "r1", "--session", "s1", *options, "--detach", "--json")
    wrong = command("run", "echo", "hi", "--budget", "steps=3", "--detach")

    record = client.record("r1")
    assert done.json == {"run_id": "r1", "session_id": "s1"}
    assert record.request is not None
    assert (record.request.tenant, record.request.labels, record.queue) == ("acme", {"env": "prod"}, "slow")
    assert record.request.on_busy == "interrupt"
    assert record.request.budget is not None
    assert record.request.budget.max_steps == 3
    assert (wrong.code, "did you mean 'max_steps'" in wrong.err) == (2, True)
    client.cancel("r1")
