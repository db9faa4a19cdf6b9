"""The world around a run: the only place that starts and kills workers, and counts calls from outside.

A supervisor starts a new worker for each dead one, as an orchestrator does. Results are read from the log of
the tools and from that of the model server, not from this library's own records.
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
from openagents_worker.testing.model_server import ModelServer, ModelServerRequest
from tests.faults.plugins import take_mark
from tests.support.waiting import await_for, wait_for

__all__ = ["Worker", "World", "table"]

ROOT = Path(__file__).resolve().parents[2]
AGENTS_FILE = ROOT / "tests" / "faults" / "agents.json"
START_TIMEOUT_S = 60.0
REGISTERED = re.compile(r"worker\.registered .*?incarnation=(\S+)")
CHECK_EVERY_S = 0.02  # how soon the supervisor detects the end of a worker

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
        """Send SIGKILL and wait for the end."""
        self.process.kill()


class World:
    """Redis, a model server and `workers` workers during the `with` block.

    `redis_url_of(name)` returns the Redis URL of the worker with that name, such as a test's proxy.
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
        """Cleared while a test delays all replies of the model."""
        self.model_answers.set()
        self.model_writes = threading.Event()
        """Cleared while a test pauses the replies that have begun."""
        self.model_writes.set()
        self.kills: list[float] = []
        """The times at which the world has killed a worker, in seconds since 1970; marks in tools are not
        included."""
        self._own_env = {"OPENAGENTS_LEASE_MS": str(lease_ms), **(env or {})}
        self._concurrency = concurrency
        self._size = workers
        self._workers: dict[str, Worker] = {}
        self._names = 0
        self._log_lines: collections.deque[str] = collections.deque(maxlen=4_000)
        self._registered: set[str] = set()
        self._entries: list[dict[str, Any]] = []
        self._read_to = 0
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor")
        self._held = ExitStack()

    # --- start and end
    # --------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.log_file.touch()
        self.marks.mkdir()
        with ExitStack() as held:
            self.redis = held.enter_context(EmbeddedRedis())
            server = ModelServer(self._reply, before_piece=self._before_piece)
            self.model = held.enter_context(server.serve_in_thread())
            settings = load_settings({**self._own_env, "OPENAGENTS_REDIS_URL": self.redis.url})
            self.client = held.enter_context(Client(settings=settings))
            held.callback(self.end)
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            print("\n".join(["--- the last log lines of the workers", *self._log_lines]), file=sys.stderr)
        self._held.close()

    def end(self) -> None:
        """End the supervisor and the workers."""
        self._over.set()
        if self._supervisor.ident is not None:
            self._supervisor.join()

    def start(self) -> Self:
        """Start the workers; returns when all are registered."""
        self._supervisor.start()
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait until the planned number of workers is registered."""
        wait_for(
            lambda: len(self.ready()) >= self._size, f"{self._size} workers are registered", START_TIMEOUT_S
        )

    def add_worker(self) -> None:
        """Add one worker; returns when it is registered."""
        self.grow_to(self._size + 1)

    def grow_to(self, size: int) -> None:
        """Have at least `size` workers; returns when they are registered."""
        with self._lock:
            self._size = max(self._size, size)
        self.wait_ready()

    def ready(self) -> list[Worker]:
        """The live workers that hold a lease and have logged their registration."""
        leases = self._registered.intersection(self.incarnations())
        names = {incarnation.partition("@")[0] for incarnation in leases}
        with self._lock:
            return [worker for worker in self._workers.values() if worker.alive and worker.name in names]

    def incarnations(self) -> list[str]:
        store = self.client.store
        found: list[str] = store.ask(lambda r: r.zrange(store.keys("workers"), 0, -1))
        return found

    def log_lines(self, text: str) -> dict[str, list[str]]:
        """The last log lines with this text, by worker name."""
        lines: dict[str, list[str]] = {}
        for line in list(self._log_lines):
            if text in line:
                lines.setdefault(line.partition(":")[0], []).append(line)
        return lines

    @contextmanager
    def silent_redis(self) -> Generator[None]:
        """Redis is stopped during the `with` block; connections stay open."""
        os.kill(self.redis.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.redis.pid, signal.SIGCONT)

    @contextmanager
    def celery_events(self) -> Generator[list[dict[str, Any]]]:
        """Celery's events during the `with` block, as Flower receives them."""
        received: list[dict[str, Any]] = []
        with self.client.app.connection_for_read() as connection:
            receiver = self.client.app.events.Receiver(connection, handlers={"*": received.append})
            capture = partial(receiver.capture, limit=None, timeout=None, wakeup=False)
            listening = threading.Thread(target=capture)
            listening.start()
            try:
                wait_for(lambda: received, "a Celery heartbeat was received")
                yield received
            finally:
                receiver.should_stop = True
                listening.join()

    # --- the supervisor ----------------------------------------------------------------------------------

    def _supervise(self) -> None:
        """Runs in one thread until the end, because Linux ends children with the thread that started them."""
        while not self._over.wait(CHECK_EVERY_S):
            with self._lock:
                for worker in [worker for worker in self._workers.values() if not worker.alive]:
                    worker.kill()  # also the rest of its process group
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
            "OPENAGENTS_CONFIG": str(AGENTS_FILE),
            "OPENAGENTS_IMPORTS": "tests.faults.agents_in_python",
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
        self._workers[name] = Worker(name, ChildProcess(name, command, env, self._note_line))

    def _note_line(self, name: str, line: str) -> None:
        self._log_lines.append(f"{name}: {line}")
        if registered := REGISTERED.search(line):
            self._registered.add(registered[1])

    def worker(self, name: str) -> Worker:
        with self._lock:
            return self._workers[name]

    def owner(self, run_id: str) -> Worker:
        """Wait for a worker that executes the run, and return it."""
        return self.worker(wait_for(lambda: self._owner_name(run_id), f"a worker executes {run_id}"))

    def _owner_name(self, run_id: str) -> str:
        name = str(self.record(run_id).worker).partition("@")[0]
        with self._lock:
            return name if name in self._workers and self._workers[name].alive else ""

    def live_workers(self) -> dict[int, Worker]:
        """The live workers by process id, as in the log of the tools."""
        with self._lock:
            return {worker.process.pid: worker for worker in self._workers.values() if worker.alive}

    def kill(self, worker: Worker) -> None:
        """Send SIGKILL; the supervisor starts a new worker."""
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
        """Submit a run whose model calls these tools, one per turn, and then answers; the input holds the
        script.

        `limit` makes the model reply to a `turn` with 429 and this `retry_after_ms`, `times` times. `text` is
        the input for a pattern with a fixed program.
        """
        asks = [[tool, dict(arguments)] for tool, arguments in steps]
        script = {"steps": asks, "latency_ms": latency_ms, "limit": dict(limit or {})}
        return self.client.submit(
            {
                "agent_id": agent,
                "session_id": session or f"session-of-{run_id}",
                "input_text": json.dumps(script) if text is None else text,
                "run_id": run_id,
                **request,
            }
        )

    def mark(self, run_id: str, *moments: str) -> None:
        """Kill the worker of the run at each of these moments: `{n}.begin`, `{n}.end` of a tool,
        `model-{turn}.received`, `model-{turn}.answered` of the model."""
        for moment in moments:
            (self.marks / f"{run_id}.{moment}").touch()

    def unreached_marks(self) -> list[str]:
        """The marks that no process has reached."""
        return sorted(path.name for path in self.marks.iterdir())

    def record(self, run_id: str) -> RunRecord:
        return self.client.record(run_id)

    def wait(self, run_id: str, timeout: float = 60) -> RunResult[Any]:
        return self.client.handle(run_id).wait(timeout=timeout)

    def events(self, run_id: str) -> list[RunEvent]:
        """All events of an ended run."""
        return list(self.client.handle(run_id).events())

    # --- the model ---------------------------------------------------------------------------------------

    async def _before_piece(self, asked: ModelServerRequest, number: int) -> None:
        if not self.model_writes.is_set():
            await await_for(self.model_writes.is_set, "the model may write")

    async def _reply(self, asked: ModelServerRequest) -> Mapping[str, Any]:
        key = asked.headers["idempotency-key"]
        run_id = key.partition(":")[0]
        text = next(str(m["content"]) for m in reversed(asked.messages) if m["role"] == "user")
        script = (
            json.loads(text)
            if text.startswith("{")
            else {"steps": [], "latency_ms": 0, "say": f"heard {text}"}
        )
        await await_for(self.model_answers.is_set, "the model may answer")
        turn = f"model-{asked.n}" if "say" not in script else text
        if await asyncio.to_thread(take_mark, self.marks, f"{run_id}.{turn}.received"):
            await asyncio.to_thread(self._kill_owner, run_id)
        if await asyncio.to_thread(take_mark, self.marks, f"{run_id}.{turn}.answered"):
            await self._kill_after_answer(run_id, key)
        return {**self._entry(asked, script, key), "latency_ms": script["latency_ms"]}

    def _entry(self, asked: ModelServerRequest, script: Mapping[str, Any], key: str) -> dict[str, Any]:
        limit = script.get("limit")
        if limit and asked.n == limit["turn"] and len(self.asked_with(key)) <= limit["times"]:
            return {"error": "rate_limit", "retry_after_ms": limit["retry_after_ms"]}
        steps: Sequence[Sequence[Any]] = script["steps"]
        if asked.n < len(steps):
            tool, arguments = steps[asked.n]
            return {"tool_calls": [{"name": tool, "arguments": arguments}]}
        return {"text": script.get("say") or f"done after {len(steps)}"}

    async def _kill_after_answer(self, run_id: str, key: str) -> None:
        """Kill the worker that executes the run now, as soon as the last bytes of the reply are sent.

        With the reply, the run may be parked, and have no worker any more.
        """
        worker = await asyncio.to_thread(self.owner, run_id)
        killing = asyncio.create_task(self._kill_once_answered(worker, key), name=f"kill {run_id}")
        killing.add_done_callback(lambda task: task.cancelled() or task.result())

    async def _kill_once_answered(self, worker: Worker, key: str) -> None:
        before = self._answered(key)
        while self._answered(key) == before:
            await asyncio.sleep(0)
        await asyncio.to_thread(self.kill, worker)

    def _kill_owner(self, run_id: str) -> None:
        self.kill(self.owner(run_id))

    def _answered(self, key: str) -> int:
        ids = {
            entry["id"] for entry in self.model.log if entry["event"] == "received" and entry["key"] == key
        }
        return sum(entry["event"] == "answered" and entry["id"] in ids for entry in self.model.log)

    # --- counting ----------------------------------------------------------------------------------------

    def asked_with(self, key: str) -> list[dict[str, Any]]:
        """The model requests with this idempotency key."""
        return [entry for entry in self.model.log if entry["event"] == "received" and entry["key"] == key]

    def entries(self, run_id: str | None = None) -> list[dict[str, Any]]:
        """The log entries of the tools in order, of one run or of all."""
        with self._lock, self.log_file.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # in the making: a write becomes visible page by page
                self._entries.append(json.loads(line))
                self._read_to += len(line)
            return [entry for entry in self._entries if run_id is None or entry["run"] == run_id]

    def wait_steps(self, count: int) -> None:
        """Wait until `count` different tool calls have ended."""

        def ended() -> bool:
            return len({entry["key"] for entry in self.entries() if entry["event"] == "end"}) >= count

        wait_for(ended, f"{count} tool calls have ended", 120)

    def calls(self, run_id: str) -> list[str]:
        """The keys of all started calls of a run, of tools and of the model, in the order of time."""
        tools = [(e["at"], e["key"]) for e in self.entries(run_id) if e["event"] == "begin"]
        asked = [
            (e["at"], e["key"])
            for e in self.model.log
            if e["event"] == "received" and str(e["key"]).startswith(f"{run_id}:")
        ]
        return [key for _, key in sorted([*tools, *asked])]

    def assert_complete_events(self, run_id: str, ending: str = "run.completed") -> list[RunEvent]:
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
