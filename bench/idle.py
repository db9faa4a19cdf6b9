"""What a worker costs while it has nothing to do, and what runs cost that only stand somewhere.

A real worker process with a deployment's settings: its processor time and the commands that Redis gets from
it, each second. First with nothing at all; then with a thousand runs that wait for a retry, ten thousand that
stand in a queue which this worker does not read, and a thousand that it carries and whose model takes its
time. What those cost is the difference. The system counts the time of each thread. The process that guards
the worker is counted with it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import redis
from celery import Celery, signals

from bench._worker import Worker, tell_machine, wait, waiting_agent
from openagents_worker.celery.app import make_worker_app
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings

HEARTBEAT, GUARD_PROCESS = "openagents-heartbeat", "the guard's process"
MOST_IDLE_CPU, MOST_COMMANDS = 0.35, 4.5  # percent of a core; a second
MOST_LIVE_CPU, MOST_BEAT_CPU = 0.8, 0.08  # percent of a core, for a thousand runs
NOTHING_CPU = 0.2  # percent of a core: less than two idle measurements of one worker differ by
LEAST_SHOWN = 0.0005  # percent of a core
LIVE, PARKED, QUEUED = 1_000, 1_000, 10_000
HOUR_MS = 3_600_000
OWN = ("info", "config|resetstat", "ping")
THREADS = "bench:threads"


class Second(NamedTuple):
    """What a second costs: CPU of each thread in percent of a core; commands by name."""

    threads: Mapping[str, float]
    commands: Mapping[str, float]

    @property
    def cpu(self) -> float:
        return sum(self.threads.values())

    @property
    def beat_cpu(self) -> float:
        return self.threads[HEARTBEAT]

    @property
    def count(self) -> float:
        return sum(self.commands.values())


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table; 0 when waiting is as cheap as is claimed."""
    parser = argparse.ArgumentParser(prog="python -m bench idle", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="of each measurement")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder,
        EmbeddedRedis(data_dir=Path(folder) / "redis") as server,
        Client(server.url) as client,
    ):
        tell_machine(server.url)
        with Worker(
            Path(folder), server.url, waiting_agent(HOUR_MS), "-c", str(LIVE + 10), app="bench.idle"
        ) as worker:
            bench = _Bench(client, worker, server.url, options.seconds)
            idle = bench.measure("nothing")
            bench.park(PARKED)
            parked = bench.measure(f"{PARKED:,} parked")
            bench.queue(QUEUED)
            queued = bench.measure(f"and {QUEUED:,} queued elsewhere")
            bench.execute(LIVE)
            live = bench.measure(f"and {LIVE:,} carried")
            bench.end()
        _print_threads(idle, live)
    met = idle.cpu <= MOST_IDLE_CPU and idle.count <= MOST_COMMANDS
    met = met and max(parked.cpu, queued.cpu) - idle.cpu <= NOTHING_CPU
    return 0 if met and live.cpu <= MOST_LIVE_CPU and live.beat_cpu <= MOST_BEAT_CPU else 1


def _print_threads(idle: Second, live: Second) -> None:
    """Who of the process has used the time."""
    print(f"\n| thread | CPU with nothing, % of a core | with {LIVE:,} carried |\n|---|---|---|")
    for name in sorted(live.threads, key=lambda one: -live.threads[one]):
        if (used := live.threads[name]) >= LEAST_SHOWN or idle.threads.get(name, 0.0) >= LEAST_SHOWN:
            print(f"| {name} | {idle.threads.get(name, 0.0):.3f} | {used:.3f} |")


class _Bench:
    def __init__(self, client: Client, worker: Worker, url: str, seconds: float) -> None:
        self._client = client
        self._worker = worker
        self._redis = redis.Redis.from_url(url)
        self._seconds = seconds
        self._live: list[str] = []
        wait(lambda: self._redis.hget(THREADS, HEARTBEAT), "the heartbeat's thread is known")
        known = self._redis.hgetall(THREADS)
        self._names = {int(number): name.decode() for name, number in known.items()}
        print("\n| the worker has | CPU, % of a core | its heartbeat's | MB | Redis commands/s | of them |")
        print("|---|---|---|---|---|---|")

    def measure(self, what: str) -> Second:
        time.sleep(2.0)  # what has just been done is not what waiting costs
        self._redis.config_resetstat()
        before, began = self._worker.cpu_s_by_thread(), time.monotonic()
        time.sleep(self._seconds)
        took = time.monotonic() - began
        children = self._worker.children()
        threads = dict.fromkeys([HEARTBEAT, GUARD_PROCESS], 0.0)
        for number, used_s in self._worker.cpu_s_by_thread().items():
            name = self._names.get(number, GUARD_PROCESS if number in children else "others")
            threads[name] = threads.get(name, 0.0) + 100 * (used_s - before.get(number, 0.0)) / took
        counts = {
            name.removeprefix("cmdstat_"): said["calls"]
            for name, said in self._redis.info("commandstats").items()
        }
        sent = _sent(counts)
        second = Second(threads, {name: count / took for name, count in sent.items()})
        often = sorted(second.commands.items(), key=lambda one: -one[1])[:5]
        named = ", ".join(f"{name} {count:.1f}" for name, count in often)
        print(
            f"| {what} | {second.cpu:.2f} | {second.beat_cpu:.3f} | {self._worker.megabytes():.0f} "
            f"| {second.count:.1f} | {named} |",
            flush=True,
        )
        return second

    def park(self, runs: int) -> None:
        for _ in range(runs):
            self._client.submit(self._request(), delay_ms=HOUR_MS)

    def queue(self, runs: int) -> None:
        for _ in range(runs):
            self._client.submit(self._request(), queue="elsewhere")

    def execute(self, runs: int) -> None:
        self._live = [self._client.submit(self._request()).id for _ in range(runs)]
        wait(lambda: self._client.record(self._live[-1]).started_ms, "the last run has begun")
        wait(lambda: self._client.record(self._live[0]).started_ms, "the first run has begun")

    def end(self) -> None:
        for run_id in self._live:
            self._client.cancel(run_id)

    def _request(self) -> RunRequest:
        return RunRequest(agent_id="waits", session_id=uuid.uuid4().hex, input_text="go")


def _sent(counts: Mapping[str, Any]) -> dict[str, int]:
    """The commands that came over a connection: what a script calls inside of Redis is counted there, too."""
    inside = {"time", "hmget", "hget", "hset", "zscore", "zrangebyscore", "scard", "smembers", "exists"}
    inside |= {"zadd", "persist", "zcard", "xadd", "hincrby", "srandmember", "hvals", "hgetall", "zrem"}
    inside |= {"pubsub|numsub", "pexpire", "set", "hlen", "hdel"}
    return {name: count for name, count in counts.items() if name not in inside and name not in OWN}


# --- what the worker runs: this module is its application ------------------------------------------------


def _worker_app() -> Celery:
    """The application as deployed, which says what the system calls its threads."""
    app = make_worker_app(load_settings())

    @signals.worker_ready.connect(weak=False)
    def tell_threads(**_: Any) -> None:
        ids = {thread.name: str(thread.native_id) for thread in threading.enumerate()}
        with redis.Redis.from_url(app.conf.broker_url) as client:
            client.hset(THREADS, mapping=ids)

    return app


if "worker" in sys.argv:
    app = _worker_app()
