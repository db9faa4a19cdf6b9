"""What the pool costs beside Celery's threads, and how many runs one process can let wait for a model.

Tasks that do nothing: our pool and Celery's `threads` pool over one loop, in alternating pairs. Whole
runs with all their commits and events: each asks the (scripted) model once, which takes its time to answer.
Redis, the worker and the producer share this machine: read the ratios, not the rates.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import redis
from celery import Celery

from openagents_worker.models import RunRequest
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings
from openagents_worker.store.embedded import EmbeddedRedis
from openagents_worker.worker.app import make_worker_app
from openagents_worker.worker.bridge import LoopThread

PACKAGES = ("celery", "kombu", "redis", "hiredis", "greenlet", "uvloop")
POOLS = {"ours": [], "threads": ["--pool", "threads"]}
SIZE = 100  # places for tasks that do nothing
LEAST_SHARE = 0.8  # of the ideal, for runs that wait five seconds


def main(arguments: Sequence[str]) -> int:
    """Print both tables; 0 when runs that wait reach their share of the ideal."""
    parser = argparse.ArgumentParser(prog="python -m bench pool", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=2000, help="that do nothing, a measurement")
    parser.add_argument("--waits", default="1000x5000,500x1000", help="RUNSxMILLISECONDS,…")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder, EmbeddedRedis() as server:
        _tell_machine(server.url)
        bench = Bench(Path(folder), server.url)
        bench.nothing(options.pairs, options.tasks)
        waits = [tuple(map(int, wait.split("x"))) for wait in options.waits.split(",") if wait]
        shares = [bench.waiting(options.pairs, runs, wait_ms) for runs, wait_ms in waits]
    return 0 if not shares or shares[0] >= LEAST_SHARE else 1


class Bench:
    """Measures on one Redis; every measurement has a worker process of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = url
        self._redis = redis.Redis.from_url(url)

    def nothing(self, pairs: int, tasks: int) -> None:
        rates: dict[str, list[float]] = {name: [] for name in POOLS}
        for number in range(pairs):
            for name in sorted(POOLS, reverse=number % 2 == 1):
                rates[name].append(self._nothing(POOLS[name], tasks))
                print(f"  {name}: {rates[name][-1]:.0f} tasks/s", file=sys.stderr, flush=True)
        medians = {name: statistics.median(found) for name, found in rates.items()}
        ratio = statistics.median(o / t for o, t in zip(rates["ours"], rates["threads"], strict=True))
        print(f"\n{tasks} tasks that do nothing, {SIZE} places, median of {pairs} pairs\n")
        print("| our pool, tasks/s | threads over one loop, tasks/s | ratio of the pairs |\n|---|---|---|")
        print(f"| {medians['ours']:.0f} | {medians['threads']:.0f} | {ratio:.2f} |", flush=True)

    def _nothing(self, pool: Sequence[str], tasks: int) -> float:
        """Tasks a second, from the first to the last, out of a queue that is full when the worker starts."""
        self._redis.flushall()
        sender = Celery("sender", broker=self._url, set_as_current=False)
        with sender.producer_pool.acquire(block=True) as producer:
            for _ in range(tasks):
                sender.send_task("bench.pool.nothing", (tasks,), queue="agents", producer=producer)
        with _Worker(self._folder, self._url, 0, "-c", str(SIZE), *pool):
            _wait(lambda: self._redis.get("bench:done") == str(tasks).encode(), "all tasks are done")
            first, last = (float(self._redis.get(f"bench:{name}") or 0) for name in ("first", "last"))
        sender.close()
        return tasks / (last - first)

    def waiting(self, pairs: int, runs: int, wait_ms: int) -> float:
        """The median share of the ideal: all runs at once, in the time that one model call takes."""
        found = [self._waiting(runs, wait_ms) for _ in range(pairs)]
        took_s, megabytes, idle = (statistics.median(column) for column in zip(*found, strict=True))
        share = wait_ms / 1000 / took_s
        print(f"\n{runs} whole runs whose model takes {wait_ms} ms, median of {pairs}\n")
        print("| took s | of the ideal | MB | MB before | kB a run |\n|---|---|---|---|---|")
        print(
            f"| {took_s:.2f} | {share:.0%} | {megabytes:.0f} | {idle:.0f} "
            f"| {(megabytes - idle) / runs * 1000:.0f} |",
            flush=True,
        )
        return share

    def _waiting(self, runs: int, wait_ms: int) -> tuple[float, float, float]:
        """Seconds from the first claim to the last end, and the worker's megabytes: at most, and before."""
        self._redis.flushall()
        with (
            Client(self._url) as client,
            _Worker(self._folder, self._url, wait_ms, "-c", str(runs)) as worker,
        ):
            idle = worker.megabytes()
            worker.pause()
            handles = [
                client.submit(RunRequest(agent_id="waits", session_id=uuid.uuid4().hex, input_text="go"))
                for _ in range(runs)
            ]
            worker.go_on()
            most = idle
            while client.record(handles[-1].id).ended_ms is None:
                most = max(most, worker.megabytes())
                time.sleep(0.1)
            for handle in handles:
                handle.wait(60)
            records = [client.record(handle.id) for handle in handles]
        began = min(record.started_ms or 0 for record in records)
        ended = max(record.ended_ms or 0 for record in records)
        print(
            f"  {runs} x {wait_ms} ms: {(ended - began) / 1000:.2f} s, {most:.0f} MB",
            file=sys.stderr,
            flush=True,
        )
        return (ended - began) / 1000, most, idle


# --- the worker ------------------------------------------------------------------------------------------


def _agent(wait_ms: int) -> Mapping[str, Any]:
    return {
        "id": "waits",
        "name": "Waits",
        "llm": {"provider": "scripted", "script": [{"text": "done"}], "latency_ms": wait_ms},
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
    }


class _Worker:
    """`celery -A bench.pool worker` for as long as the block lasts."""

    def __init__(self, folder: Path, url: str, wait_ms: int, *arguments: str) -> None:
        file = folder / "agents.json"
        file.write_text(json.dumps({"agents": [_agent(wait_ms)]}))
        self._command = [sys.executable, "-m", "celery", "-A", "bench.pool", "worker", "-l", "WARNING"]
        self._command += ["--without-gossip", "--without-mingle", "-n", f"{uuid.uuid4().hex[:6]}@bench"]
        self._command += arguments
        self._env = {**os.environ, "OPENAGENTS_REDIS_URL": url, "OPENAGENTS_CONFIG": str(file)}
        self._env |= {"OPENAGENTS_LOG_LEVEL": "WARNING", "OPENAGENTS_LEASE_MS": "30000"}
        self._url = url

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, env=self._env, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self._url) as client:
            _wait(lambda: client.zcard("oa:workers") or self._process.poll(), "the worker has registered")
        if self._process.poll() is not None:
            raise RuntimeError("the worker has ended before it began")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def megabytes(self) -> float:
        """What it occupies of memory that no other process shares (PSS)."""
        lines = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


def _wait(condition: Any, what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


def _tell_machine(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        server, durability = client.info("server"), client.config_get("append*")
    known = [f"{name} {found}" for name in PACKAGES if (found := _version(name))]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(known))
    print(
        f"Redis {server.get('valkey_version') or server['redis_version']}, "
        f"appendonly {durability['appendonly']}, appendfsync {durability['appendfsync']}",
        flush=True,
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- what the worker runs: this module is its application ------------------------------------------------


def _worker_app() -> Celery:
    app = make_worker_app(load_settings())
    done: list[float] = []

    async def nothing(tasks: int) -> None:
        done.append(time.time())
        if len(done) == tasks:
            with redis.Redis.from_url(app.conf.broker_url) as client:
                client.mset({"bench:first": done[0], "bench:last": done[-1], "bench:done": tasks})

    if "threads" not in sys.argv:
        app.task(nothing, name="bench.pool.nothing")
        return app

    loop = LoopThread()
    loop.start()

    def waited_for(tasks: int) -> None:
        loop.run(nothing(tasks))

    app.task(waited_for, name="bench.pool.nothing")
    return app


if "worker" in sys.argv:
    app = _worker_app()
