"""What all adapters share: the job, the log of its steps, the measurements, and the protocol with the driver.

An adapter runs in the virtual environment of the system that it measures, so this module imports only the
standard library. An adapter is a script with two modes: `serve FOLDER OPTIONS` executes the commands of the
driver, one JSON line per command and one per answer. With any other first argument it is a worker process
that `serve` has started.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import json
import os
import platform
import queue
import random
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from processes import Child, NotMeasured, megabytes_of

T = TypeVar("T")
LOG, ENDED = "PEER_LOG", "PEER_ENDED"  # environment variables with the paths that workers write to
KILL_IN_STEP, KILLED_RUN_STEPS, KILLED_RUN_SIZE, KILLED_RUN_PAUSE_MS = 6, 12, 1024, 300
AT_ONCE = 32  # concurrent runs in a process without a limit
POLL_S, SELDOM_S = 0.005, 0.05  # polling uses CPU time and so disturbs the measurement


@dataclass(frozen=True)
class Job:
    """A run of `steps` steps, one after the other. Each takes `pause_ms` and returns `size` bytes."""

    steps: int
    size: int
    pause_ms: int = 0

    def line(self) -> list[int]:
        return [self.steps, self.size, self.pause_ms]


NOTHING = Job(steps=1, size=8)
KILLED = Job(KILLED_RUN_STEPS, KILLED_RUN_SIZE, KILLED_RUN_PAUSE_MS)


# --- the step: what workers call -------------------------------------------------------------------------


def content(n: int, size: int) -> str:
    """The text of the n-th step: random letters, which hardly compress, and equal in every process."""
    return base64.b64encode(random.Random(n).randbytes(size * 3 // 4 + 3))[:size].decode()


async def step(run_id: str, n: int, size: int, pause_ms: int) -> str:
    """One step of a job, the same for every system."""
    log_step(run_id, n, "begin")
    if pause_ms:
        await asyncio.sleep(pause_ms / 1000)
    text = content(n, size)
    log_step(run_id, n, "end")
    return text


def log_step(run_id: str, n: int, what: str) -> None:
    """Append a line to the log, in one write, so that lines of several processes do not mix."""
    entry = {"run": run_id, "n": n, "what": what, "pid": os.getpid(), "at": time.monotonic()}
    os.write(_log(os.environ[LOG]), (json.dumps(entry) + "\n").encode())


@functools.cache
def _log(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


class Steps:
    """The log of the steps, read incrementally."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open("rb")
        self._rest = b""
        self._of: dict[str, list[dict[str, Any]]] = {}
        self.ended_at: dict[str, float] = {}
        """The end of the latest step of each run, as far as the log was read."""

    def of(self, run_id: str) -> list[dict[str, Any]]:
        self.read()
        return self._of.get(run_id, [])

    def begun(self, run_id: str) -> list[dict[str, Any]]:
        return [entry for entry in self.of(run_id) if entry["what"] == "begin"]

    def read(self) -> None:
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            entry = json.loads(line)
            self._of.setdefault(entry["run"], []).append(entry)
            if entry["what"] == "end":
                self.ended_at[entry["run"]] = entry["at"]


# --- what is measured ------------------------------------------------------------------------------------


class Peer:
    """One system with its servers and a worker. Subclasses operate it; this class measures it."""

    packages: Sequence[str] = ()
    durability = ""
    recovery_setting = ""
    """The setting of this system that determines how long the run of a dead worker waits."""
    speed_setting = ""
    """The setting that limits its speed, if there is one."""
    restarts = False
    """Whether the killed worker is started again at once. Otherwise a second worker takes over."""
    recovery_limit_s = 60.0
    recovery_job = KILLED
    steps_a_line = 1

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.folder = folder
        self.options = options
        self.held = ExitStack()
        self.servers: list[Child] = []
        self.workers: list[Child] = []
        log = folder / "steps.jsonl"
        self.env = {**os.environ, LOG: str(log), "PYTHONUNBUFFERED": "1"}
        self.env["PYTHONPATH"] = str(Path(__file__).parent)
        self.steps = Steps(log)
        self._loop = self.held.enter_context(asyncio.Runner())

    # Subclasses implement these:

    def start(self) -> None:
        """Start the servers and one worker."""
        raise NotImplementedError

    def start_worker(self, name: str) -> None:
        """Start a worker. Return when it is ready."""
        raise NotImplementedError

    def submit(self, run_id: str, job: Job) -> None:
        """Submit a run to the workers."""
        raise NotImplementedError

    def wait(self, run_id: str) -> None:
        """Wait until the system reports that the run has completed."""
        raise NotImplementedError

    def stored(self) -> dict[str, int]:
        """The stored bytes by place. The table shows the first one."""
        raise NotImplementedError

    def submit_many(self, run_ids: Sequence[str]) -> None:
        for run_id in run_ids:
            self.submit(run_id, NOTHING)

    def resume(self, run_id: str, job: Job) -> None:
        """Continue the run of a dead worker, if the caller has to do that."""

    def all_done(self, run_ids: Sequence[str], began: float) -> float:
        """Wait for runs that do nothing. Return the seconds until the end of the last step."""
        expected = set(run_ids)

        def all_ended() -> bool:
            self.steps.read()
            if not all(worker.lives for worker in self.workers):
                raise RuntimeError("a worker has died")
            return expected <= self.steps.ended_at.keys()

        wait_for(all_ended, "all runs are done", 60, SELDOM_S)
        self.wait(run_ids[-1])
        return max(self.steps.ended_at[run_id] for run_id in run_ids) - began

    def more_facts(self) -> dict[str, str]:
        """The versions of servers."""
        return {}

    # Commands of the driver:

    def do_start(self) -> dict[str, Any]:
        self.start()
        self._run_one(Job(5, 100))  # connections, caches, compiled code
        versions = {"Python": platform.python_version(), **{name: version(name) for name in self.packages}}
        return {
            "versions": versions | self.more_facts(),
            "durability": self.durability,
            "recovery_setting": self.recovery_setting,
            "speed_setting": self.speed_setting,
            "restarts": self.restarts,
        }

    def do_job(self, steps: int, size: int) -> dict[str, Any]:
        """The milliseconds per step, from the first start to the last, and the bytes that the run stored."""
        before = self.stored()
        run_id = self._run_one(Job(steps, size))
        after = self.stored()
        times = [entry["at"] for entry in self.steps.begun(run_id)]
        assert len(times) * self.steps_a_line == steps, f"{len(times)} lines for {steps} steps"
        return {
            "ms_step": (times[-1] - times[0]) * 1000 / (len(times) - 1) / self.steps_a_line,
            "stored": {where: after[where] - before[where] for where in after},
            "content": steps * size,
        }

    def do_nothing(self, runs: int) -> dict[str, Any]:
        """Runs per second, from the first submission to the end of the last run."""
        run_ids = [fresh() for _ in range(runs)]
        began = time.monotonic()
        self.submit_many(run_ids)
        took_s = self.all_done(run_ids, began)
        return {
            "runs_s": runs / took_s,
            "worker_mb": sum(megabytes_of(worker.pid) for worker in self.workers),
            "servers_mb": sum(megabytes_of(server.pid) for server in self.servers),
        }

    def do_recovery(self) -> dict[str, Any]:
        """Kill the worker in the middle of a step.

        Measure the time until a step starts, and repeated steps.
        """
        if not self.restarts:
            self.start_worker("spare")
        run_id, job = fresh(), self.recovery_job
        self.submit(run_id, job)
        killed_at = self._kill(run_id, job)
        if self.restarts:
            self.start_worker("again")
        self.resume(run_id, job)
        try:
            wait_for(lambda: self._after(run_id, killed_at), "a step begins", self.recovery_limit_s, 0.01)
        except TimeoutError:
            if not all(worker.lives for worker in self.workers):
                raise
            return {"seconds": None, "waited_s": self.recovery_limit_s}
        self.wait(run_id)
        return {"seconds": self._after(run_id, killed_at)[0]["at"] - killed_at} | self._repeated_steps(
            run_id, killed_at
        )

    # Used by the commands:

    def run_async(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(work)

    def command(self, *arguments: str) -> list[str]:
        """The command line of a worker process of this adapter."""
        return [sys.executable, str(Path(sys.argv[0]).resolve()), *arguments]

    def launch_worker(self, name: str, command: Sequence[str], *, pipe: bool = False, **env: str) -> Child:
        """Start a worker process. With `pipe`, the caller can write to its standard input."""
        worker = Child(name, command, {**self.env, **env}, self.folder, pipe=pipe)
        self.workers.append(worker)
        self.held.callback(worker.kill)
        return worker

    def _run_one(self, job: Job) -> str:
        run_id = fresh()
        self.submit(run_id, job)
        self.wait(run_id)
        return run_id

    def _kill(self, run_id: str, job: Job) -> float:
        """Kill the worker in the middle of its step. Return the time of the kill."""
        at = min(KILL_IN_STEP, job.steps // self.steps_a_line - 2)
        wait_for(lambda: len(self.steps.begun(run_id)) > at, f"step {at} begins", 60)
        time.sleep(job.pause_ms / 2 / 1000)
        pid = self.steps.begun(run_id)[-1]["pid"]
        victim = next(worker for worker in self.workers if worker.has(pid))
        killed_at = time.monotonic()
        victim.kill()
        self.workers.remove(victim)
        return killed_at

    def _after(self, run_id: str, moment: float) -> list[dict[str, Any]]:
        return [entry for entry in self.steps.begun(run_id) if entry["at"] > moment]

    def _repeated_steps(self, run_id: str, killed_at: float) -> dict[str, int]:
        before = [entry for entry in self.steps.of(run_id) if entry["at"] <= killed_at]
        begun, ended = ({e["n"] for e in before if e["what"] == what} for what in ("begin", "end"))
        again = {entry["n"] for entry in self._after(run_id, killed_at)}
        return {
            "finished_before": len(ended),
            "finished_again": len(ended & again),
            "in_flight_again": len((begun - ended) & again),
        }


class Library(Peer):
    """A system without a queue: its worker executes the runs that it reads from its standard input.

    Its death is not detected. The adapter starts another worker at once and requests the runs again, as a
    caller would have to.
    """

    restarts = True
    worker: Child

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        super().__init__(folder, options)
        self.ended = folder / "ended"
        self.ended.mkdir()
        self.env[ENDED] = str(self.ended)

    def start_worker(self, name: str) -> None:
        self.worker = self.launch_worker(name, self.command("worker"), pipe=True)
        self.worker.wait_until_said()

    def submit(self, run_id: str, job: Job) -> None:
        self._request_runs([(run_id, job, False)])

    def submit_many(self, run_ids: Sequence[str]) -> None:
        self._request_runs([(run_id, NOTHING, False) for run_id in run_ids])

    def resume(self, run_id: str, job: Job) -> None:
        self._request_runs([(run_id, job, True)])

    def wait(self, run_id: str) -> None:
        wait_for((self.ended / run_id).exists, f"the run has ended: {self.worker.last_words()}", 60)

    def _request_runs(self, runs: Sequence[tuple[str, Job, bool]]) -> None:
        assert self.worker.stdin is not None
        requests = [(run_id, job.line(), again) for run_id, job, again in runs]
        self.worker.stdin.write((json.dumps(requests) + "\n").encode())
        self.worker.stdin.flush()


async def execute_requests(execute: Callable[[str, Job, bool], Coroutine[Any, Any, None]]) -> None:
    """The main function of a worker of a library: `execute` each requested run, and mark completed runs."""
    ended = Path(os.environ[ENDED])

    slots = asyncio.Semaphore(AT_ONCE)

    async def execute_one(run_id: str, job: Job, again: bool) -> None:
        try:
            async with slots:
                await execute(run_id, job, again)
        except Exception:
            traceback.print_exc()
            os._exit(1)  # a normal exit would wait for the thread that reads requests
        (ended / run_id).touch()

    async with asyncio.TaskGroup() as tasks:
        print("READY", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            for run_id, job, again in json.loads(line):
                tasks.create_task(execute_one(run_id, Job(*job), again))


def fresh() -> str:
    return uuid.uuid4().hex


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float, poll_s: float = POLL_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(poll_s)
    return found


# --- the protocol with the driver ------------------------------------------------------------------------


def serve(kind: Callable[[Path, Mapping[str, Any]], Peer]) -> None:
    """Execute the commands of the driver until it is gone. Output of libraries goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    lines = _lines_until_end()
    peer = kind(Path(sys.argv[2]), json.loads(sys.argv[3]))
    with peer.held:
        while (line := lines.get()) is not None:
            answers.write(json.dumps(_execute(peer, json.loads(line))) + "\n")


def _execute(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    do = getattr(peer, f"do_{command.pop('do')}")
    try:
        return {"ok": do(**command)}
    except NotMeasured as why:
        return {"not_measured": str(why)}
    except Exception as error:
        traceback.print_exc()
        dead = [
            f"; {worker.name} is dead: {worker.last_words()}" for worker in peer.workers if not worker.lives
        ]
        return {"failed": f"{type(error).__name__}: {error}{''.join(dead)}"[:600]}


def _lines_until_end() -> queue.SimpleQueue[str | None]:
    """The lines of the driver. When the driver is gone, the current command is aborted."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put(None)
        time.sleep(1)  # time for `serve` to read the end of the lines
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    return lines
