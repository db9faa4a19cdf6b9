"""A shop: Redis, a model, workers of a product and its producer. The only place here that starts processes.

The input of a run selects the model's behaviour: `ok`, `fails` or `hangs`, each after at most one fault:
`retry` (a connection error), `later` (a retry-after of one minute) or `lost` (no reply; a test may kill the
worker that waits). `lingers` first calls a tool that ends only by a cancellation; `breaks` calls a tool that
always fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from celery import Celery

from openagents_worker.local.child_process import ChildProcess
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer import handle as handle_module
from openagents_worker.producer.client import Client, client_of
from openagents_worker.producer.connection import Connection
from openagents_worker.producer.handle import RunHandle
from openagents_worker.producer.task import AgentTask
from openagents_worker.store.ttl import ttl_violations
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.celery.product import make_product
from tests.support.deployment import ROOT, agent
from tests.support.json_lines import complete_lines
from tests.support.waiting import PATIENCE_S, wait_for

__all__ = ["PATIENCE_S", "Shop", "ask", "open_shop"]

_ENDS: Mapping[str, Mapping[str, Any]] = {
    "ok": {"text": "done"},
    "fails": {"error": "response"},
    "hangs": {"error": "hang"},
}
_FAULTS: Mapping[str, Mapping[str, Any]] = {
    "retry": {"error": "connection"},
    "lost": {"error": "hang"},
    "later": {"error": "rate_limit", "retry_after_ms": 60_000},
}


@dataclass
class Shop:
    """The processes and clients of the shop."""

    folder: Path
    redis_url: str
    env: Mapping[str, str]
    app: Celery
    client: Client
    model: ModelServer
    workers: list[ChildProcess] = field(default_factory=list)

    @property
    def run_agent(self) -> AgentTask:
        task: AgentTask = self.app.tasks["tasks.run_agent"]
        return task

    def request(self, text: str, **fields: Any) -> dict[str, Any]:
        """A request in a new session unless `session_id` is given."""
        return {"agent_id": "clerk", "session_id": uuid.uuid4().hex, "input_text": text, **fields}

    def notes(self, what: str) -> list[Any]:
        """The arguments of the calls of `product.note` with this name, in their order."""
        lines = complete_lines(self.folder / "notes.jsonl")
        return [value for name, value in lines if name == what]

    def note(self, what: str) -> Any:
        """A signature that records its argument."""
        return self.app.tasks["product.note"].s(what)

    def asked(self, run_id: str) -> list[dict[str, Any]]:
        """The model server's log entries of a run: requests and replies."""
        log = self.model.log
        numbers = {line["id"] for line in log if str(line.get("key")).startswith(f"{run_id}:")}
        return [line for line in log if line["id"] in numbers]

    def wait_asked(self, handle: RunHandle[Any], times: int = 1) -> None:
        wait_for(
            lambda: sum(line["event"] == "received" for line in self.asked(handle.id)) >= times,
            f"the model is asked by {handle.id}",
            timeout=PATIENCE_S,
        )

    def is_completion_pending(self, run_id: str) -> bool:
        """Whether Celery is not yet notified of the end of the run."""
        store = self.client.store
        return bool(store.ask(lambda r: r.hexists(store.keys("run", run_id), "untold")))

    def start_worker(self, queues: str = "celery,agents", *options: str) -> ChildProcess:
        """Start a worker of the product's app; returns when it is registered in Redis."""
        before = self.incarnations()
        command = [sys.executable, "-m", "celery", "-A", "tests.celery.product:app", "worker"]
        name = f"w{len(self.workers)}@shop"
        command += ["-n", name, "-Q", queues, "-c", "20", "-l", "INFO", *options]
        worker = ChildProcess("worker", command, self.env, self._say)
        self.workers.append(worker)
        if "agents" in queues:
            worker.wait_until(lambda: bool(self.incarnations() - before), "registered in Redis", PATIENCE_S)
        inspect = self.app.control.inspect([name], timeout=0.5)
        worker.wait_until(lambda: bool(inspect.ping()), "replies to remote control", PATIENCE_S)
        return worker

    def start_flower(self, *options: str, **env: str) -> str:
        """Start Flower for the product's app, with an open API unless `env` is given; returns its address."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        command = [sys.executable, "-m", "celery", "-A", "tests.celery.product:app", "flower"]
        command += ["--address=127.0.0.1", f"--port={port}", *options]
        open_api = env or {"FLOWER_UNAUTHENTICATED_API": "true"}
        flower = ChildProcess("flower", command, {**self.env, **open_api}, self._say)
        self.workers.insert(0, flower)
        url = f"http://127.0.0.1:{port}"
        flower.wait_until(lambda: ask(f"{url}/api/workers?status=true"), "shows the workers", PATIENCE_S)
        return url

    @contextmanager
    def events(self) -> Generator[list[tuple[str, dict[str, Any]]]]:
        """Celery's task events from now on: type and event."""
        received: list[tuple[str, dict[str, Any]]] = []
        with self.app.connection_for_read() as connection:
            receiver = self.app.events.Receiver(
                connection, handlers={"*": lambda event: received.append((event["type"], event))}
            )
            receiver_thread = threading.Thread(
                target=lambda: receiver.capture(wakeup=False), name="receiver_thread"
            )
            receiver_thread.start()
            try:
                self.app.control.enable_events()
                wait_for(lambda: received, "an event of a worker was received", timeout=PATIENCE_S)
                yield received
            finally:
                receiver.should_stop = True
                receiver_thread.join()

    def incarnations(self) -> set[str]:
        return set(self.client.store.ask(lambda r: r.zrange(self.client.store.keys("workers"), 0, -1)))

    def _say(self, name: str, line: str) -> None:
        with (self.folder / "workers.log").open("a") as log:
            log.write(line + "\n")


def ask(url: str, *, post: bool = False) -> Any:
    """The reply of an HTTP server, decoded if it is JSON; None without a reply."""
    request = urllib.request.Request(url, data=b"" if post else None)  # noqa: S310 - as below
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - http, to this machine
            text = answer.read().decode()
    except OSError:
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


_default_connections: list[Callable[[], Connection]] = []
"""Connections of closed shops, kept because they would be closed at their garbage collection."""


@contextmanager
def _own_default_connection() -> Generator[None]:
    """Replace the default connection: a process has one for handles without an app, and an earlier test may
    have created it with another Redis."""
    new_connection = cache(Connection)
    _default_connections.append(new_connection)
    with patch.object(handle_module, "default_connection", new_connection):
        yield


@contextmanager
def open_shop(folder: Path, *, workers: int = 1, results: bool = True, **env: str) -> Generator[Shop]:
    """A shop during the `with` block; at its end every key must have a TTL."""
    agents = [
        agent("clerk", tools=_TOOLS, llm={"retry": {"max_attempts": 12, "suspend_above_ms": 0}}),
        agent("manager", pattern={"impl": "tests.celery.tools.manage"}),
    ]
    (folder / "agents.json").write_text(json.dumps({"version": "1.0", "agents": agents}))
    with EmbeddedRedis() as redis, ModelServer(_replies()).serve_in_thread() as model:
        url = redis.url.rpartition("/")[0]
        ours = {
            "OPENAGENTS_REDIS_URL": redis.url,
            "OPENAGENTS_CONFIG": str(folder / "agents.json"),
            "OPENAGENTS_LEASE_MS": "2000",
            "OPENAGENTS_DRAIN_TIMEOUT_S": "2",
            "MODEL_URL": model.url,
            "NOTES_FOLDER": str(folder),
            "PRODUCT_REDIS": url,
            "PYTHONPATH": str(ROOT),
            **({} if results else {"NO_RESULTS": "1"}),
            **env,
        }
        with (
            _environment(ours),
            _own_default_connection(),
            make_product(url, results=results) as app,
            client_of(app) as client,
        ):
            shop = Shop(folder, url, dict(os.environ), app, client, model)
            try:
                for _ in range(workers):
                    shop.start_worker()
                yield shop
                assert ttl_violations(redis.url) == []
            finally:
                for worker in shop.workers:
                    worker.stop(10)


_TOOLS = {"linger": "tests.celery.tools.linger", "break_down": "tests.celery.tools.break_down"}


def _replies() -> Callable[[ModelServerRequest], Mapping[str, Any]]:
    tries: Counter[str] = Counter()

    def reply(asked: ModelServerRequest) -> Mapping[str, Any]:
        user_messages = [message for message in asked.messages if message["role"] == "user"]
        words = str(user_messages[-1]["content"]).split()
        key = asked.headers["idempotency-key"]
        tries[key] += 1
        for fault_name, fault in _FAULTS.items():
            if fault_name in words and tries[key] == 1:
                return fault
        if "lingers" in words and asked.n == 0:
            return {"tool_calls": [{"name": "linger", "arguments": {}}]}
        if "breaks" in words:
            return {"tool_calls": [{"name": "break_down", "arguments": {}}]}
        return next((entry for end, entry in _ENDS.items() if end in words), {"text": "done"})

    return reply


@contextmanager
def _environment(variables: Mapping[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            with contextlib.suppress(KeyError):
                del os.environ[name]
            if value is not None:
                os.environ[name] = value
