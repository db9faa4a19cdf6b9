"""The cost of an idle worker, and of runs that only wait.

It measures the CPU time of a real worker process, with the settings of a deployment, and its Redis commands
per second: first without runs; then with a thousand runs that wait for a retry; then also with ten thousand
parked runs, each of which waits for a value or for an hour; then also with ten thousand runs in a queue that
this worker does not consume; then also with a thousand runs that it executes and that wait for their model.
The differences are the costs of the waiting runs. The CPU time is that of each thread, according to the
operating system, and includes the process of the stall monitor.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import redis
from celery import Celery, signals
from redis.client import Monitor

from bench._worker import Worker, print_machine, wait, waiting_agent
from openagents_worker.celery.app import make_worker_app
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest, WaitKind
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings
from openagents_worker.store import scripts
from openagents_worker.store.formats import PARKS
from openagents_worker.store.parking import Park, Wait
from openagents_worker.store.signals import signal_fact

HEARTBEAT, STALL_MONITOR_PROCESS = "openagents-heartbeat", "process of the stall monitor"
MAX_IDLE_CPU, MAX_COMMANDS = 0.35, 4.5  # percent of a core; a second
MAX_LIVE_CPU, MAX_BEAT_CPU = 0.8, 0.08  # percent of a core, for a thousand runs
NOISE_CPU = 0.2  # percent of a core: two idle measurements of one worker differ by up to this
MIN_SHOWN = 0.0005  # percent of a core
LIVE, DELAYED, PARKED, QUEUED = 1_000, 1_000, 10_000, 10_000
HOUR_MS = 3_600_000
END = "bench: the measurement ends"
THREADS = "bench:threads"


class Second(NamedTuple):
    """The cost of a second: the CPU of each thread in percent of a core, and the commands by name."""

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
        print_machine(server.url)
        with Worker(
            Path(folder), server.url, waiting_agent(HOUR_MS), "-c", str(LIVE + 10), app="bench.idle"
        ) as worker:
            bench = _Bench(client, worker, server.url, options.seconds)
            idle = bench.measure("nothing")
            bench.submit_delayed(DELAYED)
            delayed = bench.measure(f"{DELAYED:,} delayed runs")
            bench.park(PARKED)
            parked = bench.measure(f"and {PARKED:,} parked runs")
            bench.queue(QUEUED)
            queued = bench.measure(f"and {QUEUED:,} in another queue")
            bench.execute(LIVE)
            live = bench.measure(f"and {LIVE:,} executed runs")
            bench.end()
        _print_threads(idle, live)
    met = idle.cpu <= MAX_IDLE_CPU and idle.count <= MAX_COMMANDS
    met = met and max(delayed.cpu, parked.cpu, queued.cpu) - idle.cpu <= NOISE_CPU
    return 0 if met and live.cpu <= MAX_LIVE_CPU and live.beat_cpu <= MAX_BEAT_CPU else 1


def _print_threads(idle: Second, live: Second) -> None:
    """Print the CPU time of each thread."""
    print(f"\n| thread | CPU without runs, % of a core | with {LIVE:,} executed runs |\n|---|---|---|")
    for name in sorted(live.threads, key=lambda one: -live.threads[one]):
        if (used := live.threads[name]) >= MIN_SHOWN or idle.threads.get(name, 0.0) >= MIN_SHOWN:
            print(f"| {name} | {idle.threads.get(name, 0.0):.3f} | {used:.3f} |")


class _Bench:
    def __init__(self, client: Client, worker: Worker, url: str, seconds: float) -> None:
        self._client = client
        self._worker = worker
        self._url = url
        self._redis = redis.Redis.from_url(url)
        self._seconds = seconds
        self._live: list[str] = []
        wait(lambda: self._redis.hget(THREADS, HEARTBEAT), "the heartbeat's thread is known")
        known = self._redis.hgetall(THREADS)
        self._names = {int(number): name.decode() for name, number in known.items()}
        print("\n| the worker has | CPU, % of a core | of its heartbeat | MB | Redis commands/s | of them |")
        print("|---|---|---|---|---|---|")

    def measure(self, what: str) -> Second:
        time.sleep(2.0)  # let the preceding submissions settle
        with _sent(self._url) as sent:
            before, began = self._worker.cpu_s_by_thread(), time.monotonic()
            time.sleep(self._seconds)
            took = time.monotonic() - began
        children = self._worker.children()
        threads = dict.fromkeys([HEARTBEAT, STALL_MONITOR_PROCESS], 0.0)
        for number, used_s in self._worker.cpu_s_by_thread().items():
            name = self._names.get(number, STALL_MONITOR_PROCESS if number in children else "others")
            threads[name] = threads.get(name, 0.0) + 100 * (used_s - before.get(number, 0.0)) / took
        second = Second(threads, {name: count / took for name, count in sent.items()})
        often = sorted(second.commands.items(), key=lambda one: -one[1])[:5]
        named = ", ".join(f"{name} {count:.1f}" for name, count in often)
        print(
            f"| {what} | {second.cpu:.2f} | {second.beat_cpu:.3f} | {self._worker.megabytes():.0f} "
            f"| {second.count:.1f} | {named} |",
            flush=True,
        )
        return second

    def submit_delayed(self, runs: int) -> None:
        for _ in range(runs):
            self._client.submit(self._request(), delay_ms=HOUR_MS)

    def park(self, runs: int) -> None:
        """Runs that another worker has parked."""
        store, owner = self._client.store, "other@bench:1"
        store.run(scripts.register(incarnation=owner, lease_ms=HOUR_MS, agents=[]))
        wait_for_value = Wait(WaitKind.SIGNAL, "go", fact=signal_fact("go"))
        seconds, _ = store.ask(lambda r: r.time())
        park = Park([wait_for_value, Wait(WaitKind.TIMER, until_ms=seconds * 1000 + HOUR_MS)], 0)
        for _ in range(runs):
            run_id = self._client.submit(self._request(), queue="parked").id
            claimed = store.run(
                scripts.claim(run_id=run_id, incarnation=owner, nonce=run_id, page_bytes=scripts.PAGE_BYTES)
            )
            call = scripts.suspend(
                run_id=run_id,
                fence=claimed.fence,
                kind=scripts.SuspendKind.PARK,
                delay_ms=0,
                call="",
                error_code="",
                batch_no=1,
                events=[],
                park_state=park.state,
                waits=park.waits_text,
                waiting_payload=park.event_payload,
                due_ms=park.due_ms,
                format=PARKS,
            )
            store.run(call)
        store.run(scripts.retire(incarnation=owner))

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


@contextmanager
def _sent(url: str) -> Generator[Counter[str]]:
    """Counts the commands that clients send during the block, by name, without those that scripts execute."""
    sent: Counter[str] = Counter()
    with redis.Redis.from_url(url) as marker, redis.Redis.from_url(url) as client:
        marker.echo(END)  # connects, before anything is counted
        with client.monitor() as monitor, ThreadPoolExecutor(1) as thread:
            counting = thread.submit(_count_until_the_end, monitor, sent)
            try:
                yield sent
            finally:
                marker.echo(END)
            counting.result()


def _count_until_the_end(monitor: Monitor, sent: Counter[str]) -> None:
    while (said := monitor.next_command())["command"] != f"ECHO {END}":
        if said["client_type"] != "lua":
            sent[said["command"].partition(" ")[0].lower()] += 1


# --- what the worker runs: this module is its application ------------------------------------------------


def _worker_app() -> Celery:
    """The deployed application. It also stores the operating system's ids of its threads."""
    app = make_worker_app(load_settings())

    @signals.worker_ready.connect(weak=False)
    def store_thread_ids(**_: Any) -> None:
        ids = {thread.name: str(thread.native_id) for thread in threading.enumerate()}
        with redis.Redis.from_url(app.conf.broker_url) as client:
            client.hset(THREADS, mapping=ids)

    return app


if "worker" in sys.argv:
    app = _worker_app()
