"""A shop: Redis, a model, the product's workers and its producer. The only place here that starts a process.

What the model does with a run is said by the run's input: `ok`, `fails`, `hangs`, and before that once
`retry` (it is not to be reached), `later` (it asks for a minute's patience) or `lost` (it does not answer;
the worker that waits for it may be killed). `lingers` calls a tool first that only a cancellation ends;
`breaks` calls one that fails again and again.
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
from openagents_worker.producer import client as client_module
from openagents_worker.producer.client import Client, client_of
from openagents_worker.producer.handle import RunHandle
from openagents_worker.producer.task import AgentTask
from openagents_worker.store.keys import ttl_violations
from openagents_worker.testing.model_server import ModelRequest, ModelServer
from tests.celery.product import make_product
from tests.installation import ROOT, agent
from tests.waiting import PATIENCE_S, wait_for

__all__ = ["PATIENCE_S", "Shop", "ask", "open_shop"]

_ENDS: Mapping[str, Mapping[str, Any]] = {
    "ok": {"text": "done"},
    "fails": {"error": "response"},
    "hangs": {"error": "hang"},
}
_TROUBLES: Mapping[str, Mapping[str, Any]] = {
    "retry": {"error": "connection"},
    "lost": {"error": "hang"},
    "later": {"error": "rate_limit", "retry_after_ms": 60_000},
}


@dataclass
class Shop:
    """All of it, seen from a test."""

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
        """A request in a session of its own unless one is given."""
        return {"agent_id": "clerk", "session_id": uuid.uuid4().hex, "input_text": text, **fields}

    def notes(self, what: str) -> list[Any]:
        """The values with which `product.note` was called under this name, in their order."""
        file = self.folder / "notes.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [value for name, value in lines if name == what]

    def note(self, what: str) -> Any:
        """A signature that writes down what it gets."""
        return self.app.tasks["product.note"].s(what)

    def asked(self, run_id: str) -> list[dict[str, Any]]:
        """The model's log of a run: when it was asked, and when and how it answered."""
        log = self.model.log
        numbers = {line["id"] for line in log if str(line.get("key")).startswith(f"{run_id}:")}
        return [line for line in log if line["id"] in numbers]

    def wait_asked(self, handle: RunHandle[Any], times: int = 1) -> None:
        wait_for(
            lambda: sum(line["event"] == "received" for line in self.asked(handle.id)) >= times,
            f"the model is asked by {handle.id}",
            timeout=PATIENCE_S,
        )

    def is_untold(self, run_id: str) -> bool:
        """Whether the run's end is still to be told to Celery."""
        store = self.client.store
        return bool(store.ask(lambda r: r.hexists(store.keys("run", run_id), "untold")))

    def start_worker(self, queues: str = "celery,agents", *options: str) -> ChildProcess:
        """A worker of the product's app; returns once it is known in Redis."""
        before = self.incarnations()
        command = [sys.executable, "-m", "celery", "-A", "tests.celery.product:app", "worker"]
        name = f"w{len(self.workers)}@shop"
        command += ["-n", name, "-Q", queues, "-c", "20", "-l", "INFO", *options]
        worker = ChildProcess("worker", command, self.env, self._say)
        self.workers.append(worker)
        if "agents" in queues:
            worker.wait_until(lambda: bool(self.incarnations() - before), "registered in Redis", PATIENCE_S)
        inspect = self.app.control.inspect([name], timeout=0.5)
        worker.wait_until(lambda: bool(inspect.ping()), "hears remote control", PATIENCE_S)
        return worker

    def start_flower(self, *options: str, **env: str) -> str:
        """Flower for the product's app, with an open API unless `env` says what it has; its address."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        command = [sys.executable, "-m", "celery", "-A", "tests.celery.product:app", "flower"]
        command += ["--address=127.0.0.1", f"--port={port}", *options]
        open_api = env or {"FLOWER_UNAUTHENTICATED_API": "true"}
        flower = ChildProcess("flower", command, {**self.env, **open_api}, self._say)
        self.workers.insert(0, flower)
        url = f"http://127.0.0.1:{port}"
        flower.wait_until(lambda: ask(f"{url}/api/workers?status=true"), "hears the workers", PATIENCE_S)
        return url

    @contextmanager
    def events(self) -> Generator[list[tuple[str, dict[str, Any]]]]:
        """Celery's events of tasks from now on, as a receiver gets them: type and event."""
        heard: list[tuple[str, dict[str, Any]]] = []
        with self.app.connection_for_read() as connection:
            receiver = self.app.events.Receiver(
                connection, handlers={"*": lambda event: heard.append((event["type"], event))}
            )
            ear = threading.Thread(target=lambda: receiver.capture(wakeup=False), name="ear")
            ear.start()
            try:
                self.app.control.enable_events()
                wait_for(lambda: heard, "a worker says something", timeout=PATIENCE_S)
                yield heard
            finally:
                receiver.should_stop = True
                ear.join()

    def incarnations(self) -> set[str]:
        return set(self.client.store.ask(lambda r: r.zrange(self.client.store.keys("workers"), 0, -1)))

    def _say(self, name: str, line: str) -> None:
        with (self.folder / "workers.log").open("a") as log:
            log.write(line + "\n")


def ask(url: str, *, post: bool = False) -> Any:
    """What an HTTP server answers, as JSON where it is; None while it does not."""
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


_default_clients: list[Callable[[], Client]] = []
"""Of shops that are closed. What such a client holds would look for its Redis when it is collected."""


@contextmanager
def _own_default_client() -> Generator[None]:
    """A process has one client for handles that name no app, with the Redis of its environment when it was
    first asked for: that of a test before this shop, where there was one."""
    made = cache(Client)
    _default_clients.append(made)
    with patch.object(client_module, "default_client", made):
        yield


@contextmanager
def open_shop(folder: Path, *, workers: int = 1, results: bool = True, **env: str) -> Generator[Shop]:
    """A shop for as long as the block lasts; no key of ours is left for ever by it."""
    agents = [agent("clerk", tools=_TOOLS, llm={"retry": {"max_attempts": 1}})]
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
            _own_default_client(),
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


def _replies() -> Callable[[ModelRequest], Mapping[str, Any]]:
    tries: Counter[str] = Counter()

    def reply(asked: ModelRequest) -> Mapping[str, Any]:
        told = [message for message in asked.messages if message["role"] == "user"]
        words = str(told[-1]["content"]).split()
        key = asked.headers["idempotency-key"]
        tries[key] += 1
        for trouble, fault in _TROUBLES.items():
            if trouble in words and tries[key] == 1:
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
