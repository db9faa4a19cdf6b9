"""The world around a run. The only place that starts workers and kills them, and that counts from outside.

A supervisor starts another worker for each that died, as an orchestrator does. What happened is read from the
log of the tools and that of the model server, never from our own records of it.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from openagents_worker import Client
from openagents_worker.events import TERMINAL_EVENTS, RunEvent
from openagents_worker.local.child_process import ChildProcess
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRecord, RunResult
from openagents_worker.producer.handle import RunHandle
from openagents_worker.settings import load_settings
from openagents_worker.testing.model_server import ModelRequest, ModelServer
from tests.faults.plugins import take_mark
from tests.waiting import await_for, wait_for

__all__ = ["Worker", "World", "table"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
START_TIMEOUT_S = 60.0
REGISTERED = re.compile(r"worker\.registered .*?incarnation=(\S+)")
LOOK_EVERY_S = 0.02  # how soon the supervisor sees that a worker is gone

Step = tuple[str, Mapping[str, Any]]


class Worker:
    """A worker process under its supervisor."""

    def __init__(self, name: str, process: ChildProcess) -> None:
        self.name = name
        self.process = process

    @property
    def alive(self) -> bool:
        return self.process.exit_code is None

    def signal(self, number: signal.Signals) -> None:
        if self.alive:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and its end."""
        self.process.kill()


class World:
    """Redis, a model server and `workers` workers for as long as the block lasts.

    `redis_url_of(name)` says by which URL the worker of that name reaches Redis: a proxy of a test.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 2,
        lease_ms: int = 1_500,
        concurrency: int = 100,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.log_file = folder / "tools.jsonl"
        self.marks = folder / "marks"
        self.lease_s = lease_ms / 1000
        self.redis_url_of: Callable[[str], str] = lambda name: self.redis.url
        self.restarts = True
        self.model_answers = threading.Event()
        """Set, unless a test holds all answers of the model back."""
        self.model_answers.set()
        self.kills: list[float] = []
        """When a worker was killed by the world; seconds since 1970. Marks of tools kill without it."""
        self._own_env = {"OPENAGENTS_LEASE_MS": str(lease_ms), **(env or {})}
        self._concurrency = concurrency
        self._size = workers
        self._workers: dict[str, Worker] = {}
        self._names = 0
        self._said: collections.deque[str] = collections.deque(maxlen=4_000)
        self._registered: set[str] = set()
        self._entries: list[dict[str, Any]] = []
        self._read_to = 0
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor")
        self._held = ExitStack()

    # --- life --------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.log_file.touch()
        self.marks.mkdir()
        with ExitStack() as held:
            self.redis = held.enter_context(EmbeddedRedis())
            self.model = held.enter_context(ModelServer(self._reply).serve_in_thread())
            settings = load_settings({**self._own_env, "OPENAGENTS_REDIS_URL": self.redis.url})
            self.client = held.enter_context(Client(settings=settings))
            held.callback(self.end)
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print("\n".join(["--- the workers' last lines", *self._said]), file=sys.stderr)
        self._held.close()

    def end(self) -> None:
        """End the workers, and what watches them."""
        self._over.set()
        if self._supervisor.ident is not None:
            self._supervisor.join()

    def start(self) -> Self:
        """Start the workers; returns when all are registered."""
        self._supervisor.start()
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """All workers that there should be are registered."""
        wait_for(
            lambda: len(self.ready()) >= self._size, f"{self._size} workers are registered", START_TIMEOUT_S
        )

    def add_worker(self) -> None:
        """One more worker from now on; returns when it is registered."""
        self.grow_to(self._size + 1)

    def grow_to(self, size: int) -> None:
        """At least so many workers from now on; returns when they are registered."""
        with self._lock:
            self._size = max(self._size, size)
        self.wait_ready()

    def ready(self) -> list[Worker]:
        """The workers that live, hold a lease and know it: the answer to their registration has arrived."""
        leases = self._registered.intersection(self.incarnations())
        names = {incarnation.partition("@")[0] for incarnation in leases}
        with self._lock:
            return [worker for worker in self._workers.values() if worker.alive and worker.name in names]

    def incarnations(self) -> list[str]:
        store = self.client.store
        found: list[str] = store.ask(lambda r: r.zrange(store.keys("workers"), 0, -1))
        return found

    def said(self, text: str) -> dict[str, list[str]]:
        """The last log lines with this text, by the name of the worker."""
        lines: dict[str, list[str]] = {}
        for line in list(self._said):
            if text in line:
                lines.setdefault(line.partition(":")[0], []).append(line)
        return lines

    @contextmanager
    def silent_redis(self) -> Generator[None]:
        """Redis answers nobody for as long as the block lasts; connections stay open."""
        os.kill(self.redis.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.redis.pid, signal.SIGCONT)

    @contextmanager
    def celery_events(self) -> Generator[list[dict[str, Any]]]:
        """What an event receiver of Celery, such as Flower, is told meanwhile."""
        heard: list[dict[str, Any]] = []
        with self.client.app.connection_for_read() as connection:
            receiver = self.client.app.events.Receiver(connection, handlers={"*": heard.append})
            capture = partial(receiver.capture, limit=None, timeout=None, wakeup=False)
            listening = threading.Thread(target=capture)
            listening.start()
            try:
                wait_for(lambda: heard, "a worker's heartbeat is heard")
                yield heard
            finally:
                receiver.should_stop = True
                listening.join()

    # --- the supervisor ----------------------------------------------------------------------------------

    def _supervise(self) -> None:
        """In one thread, and to the end of it: Linux ends children with the thread that started them."""
        while not self._over.wait(LOOK_EVERY_S):
            with self._lock:
                for worker in [worker for worker in self._workers.values() if not worker.alive]:
                    worker.kill()  # also what it has left of its group
                    del self._workers[worker.name]
                    if not self.restarts:
                        self._size -= 1
                while len(self._workers) < self._size:
                    self._launch()
        for worker in self._workers.values():
            worker.kill()

    def _launch(self) -> None:
        self._names += 1
        name = f"w{self._names}"
        command = [sys.executable, "-m", "openagents_worker.cli", "worker", "--name", name]
        command += ["--concurrency", str(self._concurrency)]
        env = {
            **os.environ,
            "OPENAGENTS_CONFIG": str(HERE / "agents.json"),
            "OPENAGENTS_REDIS_URL": self.redis_url_of(name),
            "OPENAGENTS_BROKER_URL": self.redis.url,
            "OPENAGENTS_LOG_LEVEL": "INFO",
            "FAULTS_LOG": str(self.log_file),
            "FAULTS_MARKS": str(self.marks),
            "FAULTS_MODEL_URL": self.model.url,
            "FAULTS_MODEL_KEY": "none",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            **self._own_env,
        }
        self._workers[name] = Worker(name, ChildProcess(name, command, env, self._hear))

    def _hear(self, name: str, line: str) -> None:
        self._said.append(f"{name}: {line}")
        if registered := REGISTERED.search(line):
            self._registered.add(registered[1])

    def worker(self, name: str) -> Worker:
        with self._lock:
            return self._workers[name]

    def owner(self, run_id: str) -> Worker:
        """The worker that carries the run; waits until one does."""
        return self.worker(wait_for(lambda: self._owner_name(run_id), f"somebody carries {run_id}"))

    def _owner_name(self, run_id: str) -> str:
        name = str(self.record(run_id).worker).partition("@")[0]
        with self._lock:
            return name if name in self._workers and self._workers[name].alive else ""

    def live_workers(self) -> dict[int, Worker]:
        """The workers that live, by process id: the tools' log names those."""
        with self._lock:
            return {worker.process.pid: worker for worker in self._workers.values() if worker.alive}

    def kill(self, worker: Worker) -> None:
        """SIGKILL; the supervisor starts another."""
        with self._lock:
            self.kills.append(time.time())
            worker.kill()

    # --- runs --------------------------------------------------------------------------------------------

    def submit(
        self,
        run_id: str,
        steps: Iterable[Step] = (),
        *,
        agent: str = "stepper",
        session: str | None = None,
        latency_ms: int = 0,
        limit: Mapping[str, int] | None = None,
        text: str | None = None,
        **request: Any,
    ) -> RunHandle[Any]:
        """A run whose model asks for these tools, one a turn, and then answers. The input says all that.

        `limit` makes the model answer a `turn` with 429 so many `times`, with this `retry_after_ms`.
        `text` is the input of a pattern that does not ask the model what to do.
        """
        asks = [[tool, dict(arguments)] for tool, arguments in steps]
        told = {"steps": asks, "latency_ms": latency_ms, "limit": dict(limit or {})}
        return self.client.submit(
            {
                "agent_id": agent,
                "session_id": session or f"session-of-{run_id}",
                "input_text": json.dumps(told) if text is None else text,
                "run_id": run_id,
                **request,
            }
        )

    def mark(self, run_id: str, *moments: str) -> None:
        """Kill the worker that carries the run at each of these moments: `{n}.begin`, `{n}.end` of a tool,
        `model-{turn}.received`, `model-{turn}.answered` of the model."""
        for moment in moments:
            (self.marks / f"{run_id}.{moment}").touch()

    def unmet(self) -> list[str]:
        """Marks that nobody has run into."""
        return sorted(path.name for path in self.marks.iterdir())

    def record(self, run_id: str) -> RunRecord:
        return self.client.record(run_id)

    def wait(self, run_id: str, timeout: float = 60) -> RunResult[Any]:
        return self.client.handle(run_id).wait(timeout=timeout)

    def events(self, run_id: str) -> list[RunEvent]:
        """All events of a run that is over."""
        return list(self.client.handle(run_id).events())

    # --- the model ---------------------------------------------------------------------------------------

    async def _reply(self, asked: ModelRequest) -> Mapping[str, Any]:
        key = asked.headers["idempotency-key"]
        run_id = key.partition(":")[0]
        text = next(str(m["content"]) for m in reversed(asked.messages) if m["role"] == "user")
        told = (
            json.loads(text)
            if text.startswith("{")
            else {"steps": [], "latency_ms": 0, "say": f"heard {text}"}
        )
        await await_for(self.model_answers.is_set, "the model may answer")
        turn = f"model-{asked.n}" if "say" not in told else text
        if await asyncio.to_thread(take_mark, self.marks, f"{run_id}.{turn}.received"):
            await asyncio.to_thread(self._kill_owner, run_id)
        if await asyncio.to_thread(take_mark, self.marks, f"{run_id}.{turn}.answered"):
            watching = asyncio.create_task(self._kill_once_answered(run_id, key), name=f"kill {run_id}")
            watching.add_done_callback(lambda task: task.cancelled() or task.result())
        return {**self._entry(asked, told, key), "latency_ms": told["latency_ms"]}

    def _entry(self, asked: ModelRequest, told: Mapping[str, Any], key: str) -> dict[str, Any]:
        limit = told.get("limit")
        if limit and asked.n == limit["turn"] and len(self.asked_with(key)) <= limit["times"]:
            return {"error": "rate_limit", "retry_after_ms": limit["retry_after_ms"]}
        steps: Sequence[Sequence[Any]] = told["steps"]
        if asked.n < len(steps):
            tool, arguments = steps[asked.n]
            return {"tool_calls": [{"name": tool, "arguments": arguments}]}
        return {"text": told.get("say") or f"done after {len(steps)}"}

    async def _kill_once_answered(self, run_id: str, key: str) -> None:
        """Kill the run's worker as soon as the last bytes of the answer are on their way."""
        before = self._answered(key)
        while self._answered(key) == before:
            await asyncio.sleep(0)
        await asyncio.to_thread(self._kill_owner, run_id)

    def _kill_owner(self, run_id: str) -> None:
        self.kill(self.owner(run_id))

    def _answered(self, key: str) -> int:
        ids = {
            entry["id"] for entry in self.model.log if entry["event"] == "received" and entry["key"] == key
        }
        return sum(entry["event"] == "answered" and entry["id"] in ids for entry in self.model.log)

    # --- counting ----------------------------------------------------------------------------------------

    def asked_with(self, key: str) -> list[dict[str, Any]]:
        """The requests that the model got with this idempotency key."""
        return [entry for entry in self.model.log if entry["event"] == "received" and entry["key"] == key]

    def entries(self, run_id: str | None = None) -> list[dict[str, Any]]:
        """What the tools wrote, in that order; of one run or of all."""
        with self._lock, self.log_file.open("rb") as file:
            file.seek(self._read_to)
            for line in file.read().splitlines():  # whole ones: each was appended in one write
                self._entries.append(json.loads(line))
            self._read_to = file.tell()
            return [entry for entry in self._entries if run_id is None or entry["run"] == run_id]

    def wait_steps(self, count: int) -> None:
        """So many different calls of tools have ended."""

        def ended() -> bool:
            return len({entry["key"] for entry in self.entries() if entry["event"] == "end"}) >= count

        wait_for(ended, f"{count} calls of tools have ended", 120)

    def calls(self, run_id: str) -> list[str]:
        """The keys of all calls begun for a run, of tools and of the model, in the order of time."""
        tools = [(e["at"], e["key"]) for e in self.entries(run_id) if e["event"] == "begin"]
        asked = [
            (e["at"], e["key"])
            for e in self.model.log
            if e["event"] == "received" and str(e["key"]).startswith(f"{run_id}:")
        ]
        return [key for _, key in sorted([*tools, *asked])]

    def assert_told_once(self, run_id: str, ending: str = "run.completed") -> list[RunEvent]:
        """The run's events have no gap and one end; returns them."""
        events = self.events(run_id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1)), "the events have no gap"
        ends = [event for event in events if event.name in TERMINAL_EVENTS]
        assert [event.name for event in ends] == [ending], f"one terminal event: {[e.payload for e in ends]}"
        assert [event.name for event in events if event.final] == ["session.run.completed"]
        return events


def table(title: str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Print rows under their names."""
    rows = list(rows)
    names = list(rows[0]) if rows else []
    widths = [max(len(name), *(len(str(row[name])) for row in rows)) for name in names]
    print(f"\n{title}")
    print("  " + "  ".join(name.rjust(width) for name, width in zip(names, widths, strict=True)))
    for row in rows:
        print("  " + "  ".join(str(row[n]).rjust(w) for n, w in zip(names, widths, strict=True)))
