"""The deployment under test: Redis, workers with a supervisor, a model server, and the outside world.

It consists of real processes. Each worker reaches Redis through a link of its own (`chaos.network`), and may
have a wall clock that is minutes off. Workers read an agents file and tools of this package.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from redis import Redis, RedisError

from chaos.clocks import WallClocks
from chaos.effects import Effects
from chaos.network import Network
from chaos.plugins import BEGUN
from chaos.redis_servers import AppendFsync, RedisWithSentinel, SingleRedis, Starter
from openagents_worker import Client
from openagents_worker.local.child_process import ChildProcess
from openagents_worker.settings import load_settings
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest

__all__ = ["Deployment", "Worker"]

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
START_TIMEOUT_S = 90.0
SUPERVISE_EVERY_S = 0.05
SCRIPT = '{"turns"'


class Worker:
    """A worker process. `name` is unique: a worker that replaces another one has a new name."""

    def __init__(self, name: str, process: ChildProcess) -> None:
        self.name = name
        self.process = process
        self.paused = False

    @property
    def alive(self) -> bool:
        return self.process.exit_code is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it is alive."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


class Deployment:
    """Redis, `workers` workers and the servers around them, during the `with` block."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int,
        lease_s: float,
        appendfsync: AppendFsync = "everysec",
        sentinel: bool = False,
    ) -> None:
        self.folder = folder
        self.lease_s = lease_s
        self.exits: list[tuple[str, int]] = []
        """Name and exit code of each worker that has ended."""
        self._size = workers
        self._strict = appendfsync == "always"
        self._starter = Starter()
        self.single = None if sentinel else SingleRedis(folder / "redis", self._starter, appendfsync)
        """The Redis of a deployment without Sentinel."""
        self.watched = RedisWithSentinel(folder / "redis", self._starter) if sentinel else None
        """The Redis of a deployment with Sentinel. There, workers have no links of their own."""
        self._names = itertools.count(1)
        self._workers: dict[str, Worker] = {}
        self._log_lines: deque[str] = deque(maxlen=20_000)
        self._blocks: deque[tuple[float, Callable[[], None]]] = deque()
        self._blocked_runs: set[str] = set()
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor")
        self._held = ExitStack()
        self.clocks = WallClocks(folder)

    # --- start and end -----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with ExitStack() as held:
            held.callback(self._starter.close)
            held.enter_context(self.redis)
            self.network = held.enter_context(Network(0 if self.single is None else self.single.port))
            self.effects = held.enter_context(Effects(self.answer_effect))
            self.model = held.enter_context(ModelServer(self._reply).serve_in_thread())
            settings = load_settings(self._settings(self.redis.url))
            self.client = held.enter_context(Client(settings=settings))
            held.callback(self._end_workers)
            self._held = held.pop_all()
        self._supervisor.start()
        self.wait_for(lambda: self.registered() >= self._size, "all workers are registered", START_TIMEOUT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _end_workers(self) -> None:
        self._over.set()
        if self._supervisor.ident is not None:
            self._supervisor.join()
        for worker in self.workers():
            worker.process.kill()

    @staticmethod
    def wait_for(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait until the condition is true. Raises `TimeoutError` that names it."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
            time.sleep(0.1)

    # --- workers -----------------------------------------------------------------------------------------

    def workers(self) -> list[Worker]:
        """The live workers, the oldest first."""
        with self._lock:
            return [worker for worker in self._workers.values() if worker.alive]

    def registered(self) -> int:
        """How many workers hold a lease; 0 if Redis does not answer."""
        store = self.client.store
        try:
            return int(self.admin.zcard(store.keys("workers")))
        except RedisError:
            return 0

    def log_of(self, worker: str) -> list[str]:
        return [line for line in list(self._log_lines) if line.startswith(f"{worker}: ")]

    def log_text(self) -> str:
        """The last log lines of all workers."""
        return "\n".join(self._log_lines)

    def _supervise(self) -> None:
        while not self._over.wait(SUPERVISE_EVERY_S):
            with self._lock:
                for worker in [worker for worker in self._workers.values() if not worker.alive]:
                    worker.process.kill()  # also what is left of its process group
                    self.exits.append((worker.name, worker.process.exit_code or 0))
                    self.network.close(worker.name)
                    del self._workers[worker.name]
                while len(self._workers) < self._size:
                    self._starter.run(self._launch)

    def _launch(self) -> None:
        number = next(self._names)
        name = f"w{number}"
        command = [
            sys.executable,
            "-m",
            "openagents_worker.cli",
            "worker",
            "--name",
            name,
            "--concurrency",
            "60",
        ]
        env = {
            **os.environ,
            **self._settings(self.redis.url if self.single is None else self.network.open(name)),
            "OPENAGENTS_CONFIG": str(HERE / "agents.json"),
            "OPENAGENTS_LOG_LEVEL": "INFO",
            "CHAOS_EFFECTS_URL": self.effects.url,
            "CHAOS_MODEL_URL": self.model.url,
            "OPENAGENTS_IMPORTS": "chaos.plugins,chaos.api_key",
            "PYTHONPATH": str(HERE.parent),
            "PYTHONUNBUFFERED": "1",
        }
        env |= self.clocks.environment(name, number)
        self._workers[name] = Worker(name, ChildProcess(name, command, env, self._keep_line))

    def _settings(self, redis_url: str) -> dict[str, str]:
        return {
            "OPENAGENTS_REDIS_URL": redis_url,
            "OPENAGENTS_LEASE_MS": str(round(self.lease_s * 1000)),
            "OPENAGENTS_DURABILITY": "strict" if self._strict else "normal",
        }

    def _keep_line(self, name: str, line: str) -> None:
        self._log_lines.append(f"{name}: {line}")

    # --- Redis -------------------------------------------------------------------------------------------

    @property
    def redis(self) -> SingleRedis | RedisWithSentinel:
        either = self.single or self.watched
        assert either is not None
        return either

    @property
    def admin(self) -> Redis:
        """A client of the Redis that has the data, without a link in between."""
        return self.redis.admin

    def connections(self) -> int:
        return int(self.admin.info("clients")["connected_clients"])

    def redis_bytes(self) -> int:
        return int(self.admin.info("memory")["used_memory"])

    def worker_bytes(self) -> int:
        """The resident memory of the largest worker."""
        return max((_resident_bytes(worker.process.pid) for worker in self.workers()), default=0)

    # --- the model and the outside world ------------------------------------------------------------------

    def block_next_effect(self, seconds: float, blocks: Callable[[], None]) -> None:
        """The next execution of a step blocks its event loop; `blocks` is called then. A run is never blocked
        twice."""
        self._blocks.append((seconds, blocks))

    def answer_effect(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """What an execution of a step is told beside its number: how long it must block its event loop, and
        whether it is limited."""
        with self._lock:
            answer: dict[str, Any] = {}
            if self._blocks and entry["run"] not in self._blocked_runs:
                self._blocked_runs.add(entry["run"])
                answer["block_s"], blocks = self._blocks.popleft()
                blocks()
            if limits := entry.get("limits"):
                executions = sum(each.key == entry["key"] for each in self.effects.executions)
                answer["limited"] = executions <= limits
            return answer

    def _reply(self, asked: ModelServerRequest) -> Mapping[str, Any]:
        """The model's reply. It contains the serial number of its execution, as the result of a step does."""
        key = asked.headers["idempotency-key"]
        begun = float(asked.headers["authorization"].removeprefix(f"Bearer {BEGUN}"))
        serial = self.effects.record(key, key.partition(":")[0], begun)
        turns, turn = _script_of(asked.messages)
        if not turns:
            return {"text": f"heard {asked.messages[-1]['content']} #{serial}"}
        if turn >= len(turns):
            return {"text": f"done #{serial}"}
        calls = [
            {"name": call["tool"], "arguments": {**_without(call, "tool"), "asked": serial}}
            for call in turns[turn]
        ]
        return {"tool_calls": calls}


def _script_of(messages: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Sequence[Mapping[str, Any]]], int]:
    """The turns that the last script in these messages asks for, and the number of the next one.

    Messages that somebody has put into the run may follow the script.
    """
    for at in reversed(range(len(messages))):
        text = str(messages[at]["content"])
        if messages[at]["role"] == "user" and SCRIPT in text:
            script, _ = json.JSONDecoder().raw_decode(text[text.rindex(SCRIPT) :])
            return script["turns"], sum(bool(each.get("tool_calls")) for each in messages[at:])
    return (), 0


def _without(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in call.items() if key != name}


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # it has ended, or there is no /proc
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
