"""A deployment with planted secrets, and all its outputs.

It has two workers, one with JSON logs and one with text logs, and a subscriber to every channel of its Redis.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis

from openagents_worker.local.stack import Stack
from openagents_worker.producer.client import Client
from openagents_worker.producer.handle import RunHandle
from tests.hostile.planted import FILE_KEY, OWN_KEY
from tests.support.deployment import PATIENCE_S, ROOT, Model, agent

__all__ = ["Planting", "planting_in"]

TOOLS = {name: f"tests.hostile.planted.{name}" for name in ("leak", "control", "own_key")}
AGENTS = (
    agent("clerk", tools=TOOLS, llm={"api_key_env": "PLANTED_KEY", "retry": {"max_attempts": 1}}),
    agent("filed", llm={"api_key_file": "${KEY_FILE}", "retry": {"max_attempts": 1}}),
    agent("tenanted", llm={"retry": {"max_attempts": 1}}),
    agent("pattern", pattern={"impl": "tests.hostile.planted.LeakyPattern"}),
    agent("memory", memory={"impl": "tests.hostile.planted.LeakyMemory", "on_error": "fail"}),
)


class Planting:
    """Runs things in the deployment, and reads its outputs."""

    def __init__(self, stack: Stack, model: Model, client: Client, log: list[str], heard: list[str]) -> None:
        self.stack, self.model, self.client = stack, model, client
        self.log = log
        """Every line that a worker has printed."""
        self.heard = heard
        """Every message on a channel of Redis, with the channel's name."""
        self._runs = 0
        self._looked_at: Counter[str] = Counter()

    def submit(self, agent_id: str, input_text: str = "Go.", **fields: Any) -> RunHandle[Any]:
        self._runs += 1
        ids = {"session_id": f"s{self._runs}", "run_id": f"r{self._runs}"}
        return self.client.submit({"agent_id": agent_id, "input_text": input_text, **ids, **fields})

    def ended(self, handles: Iterable[RunHandle[Any]]) -> list[RunHandle[Any]]:
        """Wait for the end of each run, and return their handles."""
        all_of_them = list(handles)
        for handle in all_of_them:
            handle.wait(PATIENCE_S)
        return all_of_them

    def stored(self) -> Iterator[str]:
        """Every key of Redis, in all databases, with its content."""
        for database in range(2):
            with redis.Redis.from_url(self.stack.redis_url, db=database) as client:
                for key in client.scan_iter(count=1000):
                    yield f"{database} {key!r} {_value(client, key)!r}"

    def prompts(self) -> Iterator[str]:
        """Every request that the model server has received."""
        for line in self.model.server.log:
            yield json.dumps(line, ensure_ascii=False)

    def everything(self) -> Iterator[tuple[str, str]]:
        """All that is stored now, and all new messages, log lines and requests, each with its source."""
        for text in self.stored():
            yield "redis", text
        for where, texts in (("channel", self.heard), ("log", self.log), ("model", list(self.prompts()))):
            known, self._looked_at[where] = self._looked_at[where], len(texts)
            for text in texts[known : self._looked_at[where]]:
                yield where, text


def _value(client: redis.Redis, key: bytes) -> Any:
    match client.type(key):
        case b"string":
            return client.get(key)
        case b"hash":
            return client.hgetall(key)
        case b"list":
            return client.lrange(key, 0, -1)
        case b"set":
            return client.smembers(key)
        case b"zset":
            return client.zrange(key, 0, -1, withscores=True)
        case b"stream":
            return client.xrange(key)
    return None  # it has expired since


@contextmanager
def _heard(url: str) -> Generator[list[str]]:
    """Records what is published on any channel while the block runs."""
    heard: list[str] = []
    over = threading.Event()

    def listen(pubsub: Any) -> None:
        while not over.is_set():
            message = pubsub.get_message(timeout=0.05)
            if message is not None:
                heard.append(repr((message["channel"], message["data"])))

    with redis.Redis.from_url(url) as client, client.pubsub() as pubsub:
        pubsub.psubscribe("*")
        thread = threading.Thread(target=listen, args=(pubsub,), name="listens to all channels")
        thread.start()
        try:
            yield heard
        finally:
            over.set()
            thread.join()


@contextmanager
def planting_in(folder: Path) -> Generator[Planting]:
    file = folder / "agents.json"
    file.write_text(json.dumps({"version": "1.0", "agents": list(AGENTS)}))
    key_file = folder / "key"
    key_file.write_text(FILE_KEY)
    key_file.chmod(0o644)
    model, log = Model(), []
    with ExitStack() as opened:
        opened.enter_context(model.server.serve_in_thread())
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MODEL_URL": model.server.url,
            "PLANTED_KEY": OWN_KEY,
            "KEY_FILE": str(key_file),
            "OPENAGENTS_IMPORTS": "tests.hostile.planted_keys",
            "OPENAGENTS_CONFIG": str(file),
            "OPENAGENTS_LOG_FORMAT": "json",
        }
        stack = opened.enter_context(Stack(env=env, say=lambda name, line: log.append(line)))
        heard = opened.enter_context(_heard(stack.redis_url))
        stack.start_worker("json")
        stack.set_env(OPENAGENTS_LOG_FORMAT="text")
        stack.start_worker("text")
        client = opened.enter_context(Client(settings=stack.settings))
        yield Planting(stack, model, client, log, heard)
