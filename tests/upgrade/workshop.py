"""The workshop: Redis, a model, workers of two versions. The only place that starts and counts them.

What was done is counted by the model and by the tool, in the order of time; what the system says of it is
compared with that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openagents_worker.local.child_process import ChildProcess
from openagents_worker.local.stack import Stack
from openagents_worker.models import RunRecord
from openagents_worker.producer.client import Client
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.support.json_lines import complete_lines
from tests.support.waiting import PATIENCE_S, wait_for
from tests.upgrade.versions import PRODUCT, Version

__all__ = ["PATIENCE_S", "Workshop", "opened", "request"]

MANY = -1  # steps, until the model is told that it is enough
LEASE_MS = 1_500
SAWING_MS = 300
RETRY_AFTER_MS = 2_500


def request(
    *, steps: int = MANY, session: str = "", limited: bool = False, agent: str = "carpenter"
) -> dict[str, Any]:
    """A run of so many steps, or of many. A limited one is asked for patience once, at its second turn."""
    return {
        "agent_id": agent,
        "session_id": session or f"session-{uuid.uuid4().hex[:8]}",
        "input_text": json.dumps({"steps": steps, "limited": limited}),
        "run_id": uuid.uuid4().hex,
    }


class Workshop:
    """See `opened`."""

    def __init__(self, stack: Stack, client: Client, model: ModelServer, log: Path) -> None:
        self.stack = stack
        self.client = client
        self._model = model
        self._log = log
        self._numbers: Counter[str] = Counter()

    def start(self, version: Version) -> ChildProcess:
        """One more worker of this version: old1, old2, …"""
        self._numbers[version.name] += 1
        self.stack.set_env(**version.env())
        return self.stack.start_worker(f"{version.name}{self._numbers[version.name]}")

    def produce(self, version: Version, what: str, requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What a producer process of this version says."""
        done = subprocess.run(
            [sys.executable, str(PRODUCT / "producer.py"), what, json.dumps(requests)],
            env={**os.environ, **version.env(), "OPENAGENTS_REDIS_URL": self.stack.redis_url},
            cwd=self._log.parent,
            capture_output=True,
            text=True,
            timeout=2 * PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        told: dict[str, Any] = json.loads(done.stdout)
        assert version.wrote(told["from"]), f"a producer that should be of the {version.name} version"
        return told

    def works_on(self, worker: ChildProcess, runs: Iterable[str]) -> None:
        """Each of these runs is in the hands of this worker, and gets on there by two steps at least."""
        runs = list(runs)
        prefix = f"{worker.name}@"
        wait_for(
            lambda: all(str(self._alive(run_id).worker).startswith(prefix) for run_id in runs),
            f"{worker.name} carries {', '.join(runs)}",
            timeout=PATIENCE_S,
        )
        before = {run_id: self._alive(run_id).steps for run_id in runs}
        wait_for(
            lambda: all(self._alive(run_id).steps >= steps + 2 for run_id, steps in before.items()),
            f"they get on at {worker.name}: {before}",
            timeout=PATIENCE_S,
        )

    def _alive(self, run_id: str) -> RunRecord:
        record = self.client.record(run_id)
        assert not record.state.is_terminal, f"{run_id} has ended, and nobody wanted that: {record.result}"
        return record

    # --- what was done -----------------------------------------------------------------------------------

    def sawn(self, run_id: str) -> list[dict[str, Any]]:
        """What the tool noted of a run, in the order of time."""
        lines = complete_lines(self._log)
        return [line for line in lines if line["key"].startswith(f"{run_id}:")]

    def end_jobs(self) -> None:
        """The jobs of all runs have succeeded."""
        self._log.with_name("fired").touch()

    def calls(self, run_id: str) -> list[str]:
        """The keys of all calls begun for a run, the model's and the tool's, in the order of time."""
        begun = [(line["at"], line["key"]) for line in self.sawn(run_id) if line["what"] == "begin"]
        asked = [
            (line["at"], line["key"])
            for line in self._model.log
            if line["event"] == "received" and str(line["key"]).startswith(f"{run_id}:")
        ]
        return [key for _, key in sorted([*begun, *asked])]


@contextmanager
def opened(folder: Path, enough: threading.Event) -> Generator[Workshop]:
    """A workshop without workers. Runs of many steps come to their end once it is `enough`."""
    limited: set[str] = set()
    log = folder / "carpentry.jsonl"
    log.touch()

    def reply(asked: ModelServerRequest) -> Mapping[str, Any]:
        key = asked.headers["idempotency-key"]
        told = json.loads(next(str(m["content"]) for m in reversed(asked.messages) if m["role"] == "user"))
        if told["limited"] and asked.n == 1 and key not in limited:
            limited.add(key)
            return {"error": "rate_limit", "retry_after_ms": RETRY_AFTER_MS}
        if asked.n < told["steps"] or (told["steps"] == MANY and not enough.is_set()):
            return {"tool_calls": [{"name": "saw", "arguments": {"ms": SAWING_MS}}], "latency_ms": 30}
        return {"text": f"done after {asked.n}", "latency_ms": 30}

    with ModelServer(reply).serve_in_thread() as model:
        env = {
            **os.environ,
            "CARPENTRY_LOG": str(log),
            "MODEL_URL": model.url,
            "OPENAGENTS_CONFIG": str(PRODUCT / "agents.json"),
            "OPENAGENTS_LEASE_MS": str(LEASE_MS),
        }
        with Stack(env=env) as stack, Client(settings=stack.settings) as client:
            yield Workshop(stack, client, model, log)
