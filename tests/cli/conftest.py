"""Fixtures for the tests of the command line: commands in this process, a simulated worker, and a client."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from openagents_worker.cli.commands import run
from openagents_worker.local.child_process import free_port
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.client import Client
from openagents_worker.store import scripts
from openagents_worker.store.fleet import WorkerCard
from tests.support.scripts import LEASE_MS, Hand

W1 = "w1@box:a1b2c3"


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit code and its output."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Done]


def typed(
    arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Done:
    """Run `openagents-worker` with these arguments in this process, with its environment."""
    monkeypatch.setattr(sys, "argv", ["openagents-worker", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run()
    shown = capsys.readouterr()
    return Done(int(ended.value.code or 0), shown.out, shown.err)


@pytest.fixture
def command(redis_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `openagents-worker` with these arguments in this process, with the Redis of the test."""
    monkeypatch.setenv("OPENAGENTS_REDIS_URL", redis_url)

    return lambda *arguments: typed(arguments, monkeypatch, capsys)


def node_of_a_cluster() -> EmbeddedRedis:
    """A node without slots. By default, its second port is higher by 10,000, and there may be none."""
    return EmbeddedRedis(extra={"cluster-enabled": "yes", "cluster-port": str(free_port())})


@pytest.fixture
def client(redis_url: str) -> Generator[Client]:
    with Client(redis_url) as client:
        yield client


@pytest.fixture
def hand(redis_url: str) -> Generator[Hand]:
    """A worker of the previous version: it does not publish its queues and agents."""
    with Hand(redis_url) as hand:
        yield hand


def register(client: Client, *, agents: tuple[str, ...], queues: tuple[str, ...] = ("agents",)) -> None:
    """Register a worker with these agents and queues, and renew its lease once."""
    definitions = [word for id_ in agents for word in (id_, json.dumps({"queue": None, "def_hash": "h"}))]
    card = WorkerCard("box", 17, queues, dict.fromkeys(agents, "h"), 20, "9.9").to_json()
    client.store.run(scripts.register(incarnation=W1, lease_ms=LEASE_MS, agents=definitions, info=card))
    client.store.run(scripts.renew(incarnation=W1, lease_ms=LEASE_MS, loop_lag_ms=40))


def retire(client: Client) -> None:
    client.store.run(scripts.retire(incarnation=W1))
