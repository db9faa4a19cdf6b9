"""The throughput of the pool, compared with Celery's threads, and with runs that wait for a model.

First, in alternating rounds: empty tasks in the pool of this library, empty tasks in Celery's `threads` pool
over one event loop, and complete runs whose scripted model answers at once. Then complete runs whose model
needs some time: the queue has six times as many runs as the worker has slots. The ideal is a worker that
needs no CPU time. Every run is complete, with its commits and events, on a Redis with an append-only file.
Redis, the worker and the producer share this machine, so only the ratios are meaningful, not the rates.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import redis
from celery import Celery

from bench._worker import Worker, print_machine, wait, waiting_agent
from openagents_worker.celery.app import make_worker_app
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings
from openagents_worker.worker.loop_thread import LoopThread

SIZE = 100  # slots for empty tasks
WAVES = 6
MIN_OF_THREADS = 0.95
MIN_OF_NOTHING = 0.5
MIN_SHARE = {5_000: 0.95, 10_000: 0.92, 1_000: 0.88}  # of the ideal, by the time of a model call in ms
MAX_MB, MAX_KB_A_RUN = 100, 60


def main(arguments: Sequence[str]) -> int:
    """Print the tables. Return 0 if all targets are met."""
    parser = argparse.ArgumentParser(prog="python -m bench pool", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=2000, help="number of empty tasks per measurement")
    parser.add_argument("--waits", default="500x1000,1000x5000,2000x10000", help="SLOTSxMILLISECONDS,…")
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder,
        EmbeddedRedis(data_dir=Path(folder) / "redis") as server,
    ):
        print_machine(server.url)
        bench = Bench(Path(folder), server.url)
        met = [bench.at_once(options.rounds, options.tasks)]
        waits = [tuple(map(int, wait.split("x"))) for wait in options.waits.split(",") if wait]
        met += [bench.waiting(options.rounds, places, wait_ms) for places, wait_ms in waits]
    return 0 if all(met) else 1


class Bench:
    """Measures on one Redis. Every measurement starts a new worker process."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = url
        self._redis = redis.Redis.from_url(url)

    def _worker(self, wait_ms: int, places: int, *options: str) -> Worker:
        agent, options = waiting_agent(wait_ms), ("-c", str(places), *options)
        return Worker(self._folder, self._url, agent, *options, app="bench.pool")

    def at_once(self, rounds: int, tasks: int) -> bool:
        """Measure how many empty tasks and runs one process executes per second."""
        measures: dict[str, Callable[[], float]] = {
            "no-op, threads over one loop": lambda: self._empty_tasks(["--pool", "threads"], tasks),
            "no-op, our pool": lambda: self._empty_tasks([], tasks),
            "run without tools, our pool": lambda: self._runs(tasks),
        }
        rates: dict[str, list[float]] = {name: [] for name in measures}
        for number in range(rounds):
            for name in sorted(measures, reverse=number % 2 == 1):
                rates[name].append(measures[name]())
                print(f"  {name}: {rates[name][-1]:.0f}/s", file=sys.stderr, flush=True)
        threads, ours, runs = (rates[name] for name in measures)
        of_threads, of_nothing = _ratio(ours, threads), _ratio(runs, ours)
        print(f"\n{tasks} in the queue, {SIZE} slots, median of {rounds} alternating rounds\n")
        print("| | a second | ratio of the rounds |\n|---|---|---|")
        print(f"| no-op, Celery's threads over one loop | {statistics.median(threads):.0f} | |")
        print(f"| no-op, our pool | {statistics.median(ours):.0f} | {of_threads:.2f} of the threads |")
        print(f"| run without tools | {statistics.median(runs):.0f} | {of_nothing:.2f} of the no-op |")
        return of_threads >= MIN_OF_THREADS and of_nothing >= MIN_OF_NOTHING

    def _empty_tasks(self, pool: Sequence[str], tasks: int) -> float:
        """Tasks per second, from the first to the last. The queue is full when the worker starts."""
        self._redis.flushall()
        sender = Celery("sender", broker=self._url, set_as_current=False)
        with sender.producer_pool.acquire(block=True) as producer:
            for _ in range(tasks):
                sender.send_task("bench.pool.nothing", (tasks,), queue="agents", producer=producer)
        with self._worker(0, SIZE, *pool):
            wait(lambda: self._redis.get("bench:done") == str(tasks).encode(), "all tasks are done")
            first, last = (float(self._redis.get(f"bench:{name}") or 0) for name in ("first", "last"))
        sender.close()
        return tasks / (last - first)

    def _runs(self, runs: int) -> float:
        """Runs per second, from the first claim to the last end. The queue is full when the worker starts."""
        took = self._execute(SIZE, runs, wait_ms=0)
        return runs / took.seconds

    def waiting(self, rounds: int, places: int, wait_ms: int) -> bool:
        """Measure throughput (as a share of the ideal) and memory with runs that wait for a model."""
        found = [self._execute(places, WAVES * places, wait_ms) for _ in range(rounds)]
        seconds, megabytes, cpu_ms = (
            statistics.median(getattr(one, name) for one in found) for name in _Measurement._fields
        )
        share, allowed = WAVES * wait_ms / 1000 / seconds, MAX_MB + places * MAX_KB_A_RUN / 1000
        least = MIN_SHARE.get(wait_ms, 0.0)
        print(f"\n{WAVES} x {places:,} runs whose model takes {wait_ms:,} ms, {places:,} slots, ", end="")
        print(f"median of {rounds}\n")
        print("| runs/s | of the ideal | target | MB | allowed | CPU of the worker, ms per run |")
        print("|---|---|---|---|---|---|")
        print(
            f"| {WAVES * places / seconds:.0f} | {share:.1%} | {least:.0%} "
            f"| {megabytes:.0f} | {allowed:.0f} | {cpu_ms:.2f} |",
            flush=True,
        )
        return share >= least and megabytes <= allowed

    def _execute(self, places: int, runs: int, wait_ms: int) -> _Measurement:
        """Let one worker execute `runs` runs, all of which are in the queue when it starts."""
        self._redis.flushall()
        with (
            Client(self._url) as client,
            self._worker(wait_ms, places) as worker,
        ):
            worker.pause()
            handles = [
                client.submit(RunRequest(agent_id="waits", session_id=uuid.uuid4().hex, input_text="go"))
                for _ in range(runs)
            ]
            cpu_s, most = worker.cpu_s(), 0.0
            worker.go_on()
            while client.record(handles[-1].id).ended_ms is None:
                most = max(most, worker.megabytes())
                time.sleep(0.5)
            for handle in handles:
                handle.wait(60)
            cpu_s = worker.cpu_s() - cpu_s
            records = [client.record(handle.id) for handle in handles]
        began = min(record.started_ms or 0 for record in records)
        ended = max(record.ended_ms or 0 for record in records)
        took = _Measurement((ended - began) / 1000, most, 1000 * cpu_s / runs)
        print(f"  {runs} runs, {wait_ms} ms: {took.seconds:.2f} s", file=sys.stderr, flush=True)
        return took


class _Measurement(NamedTuple):
    """The time, the memory and the CPU time of the worker (per run) for a number of runs."""

    seconds: float
    megabytes: float
    cpu_ms: float


def _ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


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
