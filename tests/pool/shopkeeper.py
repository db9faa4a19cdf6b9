"""The worker of the example shop: the only place where these tests start it, inspect it and control it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from celery.app.control import Control
from celery.result import AsyncResult

from openagents_worker.producer.client import Client
from tests.support.waiting import PATIENCE_S, wait_for

ROOT = Path(__file__).parents[2]


class Shop:
    """One worker process, its Redis, and a producer's view of both."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path, node: str) -> None:
        self.url, self.process, self.node = url, process, node
        self.pool = "ours"
        self.loop = ""
        self._log = log
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        self.client = Client(url)
        self.app = Celery("customer", broker=url, backend=url, set_as_current=False)
        self.app.conf.task_default_queue = "shop"
        self.control: Control = self.app.control

    def close(self) -> None:
        # A result that outlives its Redis must not try to unsubscribe.
        self.app.backend.remove_pending_result = lambda result: result
        self.redis.close()
        self.client.close()
        self.app.close()
        self.app.backend.client.close()

    # --- control ---

    def send(self, task: str, *args: Any, **options: Any) -> AsyncResult:
        return self.app.send_task(f"tests.pool.shop.{task}", args, **options)

    def tell(self, command: str, **arguments: Any) -> Any:
        """Send a remote control command; returns the worker's reply."""
        replies = self.control.broadcast(
            command, arguments=arguments, destination=[self.node], reply=True, timeout=PATIENCE_S, limit=1
        )
        return replies[0][self.node]

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.tell("stats")
        return stats

    def signal(self, number: signal.Signals) -> int:
        """Send the worker a signal that ends it; returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    # --- inspection ---

    @property
    def log(self) -> str:
        return self._log.read_text()

    def notes(self, tag: str) -> list[str]:
        found: list[str] = self.redis.lrange(f"notes:{tag}", 0, -1)
        return found

    def wait_begun(self, *tags: str) -> None:
        wait_for(lambda: all(self.notes(tag) for tag in tags), "the tasks have started", PATIENCE_S)

    def active(self) -> int:
        return len(self.tell("active"))

    def in_broker(self, queue: str = "shop") -> int:
        return self.redis.llen(queue)


def new_tag() -> str:
    return uuid.uuid4().hex[:8]


@contextmanager
def open_shop(
    folder: Path, url: str, *arguments: str, env: Mapping[str, str] | None = None, agents: Sequence[Any] = ()
) -> Generator[Shop]:
    """A worker process of the shop's application during the `with` block."""
    file, log = folder / "agents.json", folder / f"worker-{new_tag()}.log"
    file.write_text(json.dumps({"agents": [*AGENTS, *agents]}))
    node = f"w{new_tag()}@test"
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OPENAGENTS_REDIS_URL": url,
        "OPENAGENTS_RESULT_BACKEND": url,
        "OPENAGENTS_CONFIG": str(file),
        "OPENAGENTS_LEASE_MS": "2000",
        "OPENAGENTS_DRAIN_TIMEOUT_S": "0.5",  # do not wait for runs that wait for a model
        **(env or {}),
    }
    command = [sys.executable, "-m", "celery", "-A", "tests.pool.shop", "worker", "-n", node]
    command += ["-Q", "shop,agents", "--without-gossip", "--without-mingle", "-l", "INFO", *arguments]
    with opened(url, command, variables, log, node) as shop:
        yield shop


@contextmanager
def opened(
    url: str, command: Sequence[str], variables: Mapping[str, str], log: Path, node: str
) -> Generator[Shop]:
    """Start the command and wait until the worker is ready; it ends with the `with` block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    shop = Shop(url, process, log, node)
    try:
        wait_for(
            lambda: "ready." in shop.log or process.poll() is not None, "the worker is ready", PATIENCE_S
        )
        assert process.poll() is None, shop.log
        yield shop
    finally:
        process.kill()
        process.wait()
        shop.close()


def agent(agent_id: str, *script: dict[str, Any], tools: Mapping[str, str] | None = None) -> dict[str, Any]:
    """An agent with a scripted model; `tools` maps tool ids to import paths."""
    return {
        "id": agent_id,
        "name": agent_id,
        "llm": {"provider": "scripted", "script": list(script)},
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
        "tools": [{"id": name, "impl": impl} for name, impl in (tools or {}).items()],
    }


AGENTS = (agent("greeter", {"text": "hello"}), agent("waiter", {"text": "at last", "latency_ms": 60_000}))
