"""How long 1,500 cancelled runs delay a new run.

All of them wait in the queue of one worker when they are cancelled. Each leaves its own message and one more
that notifies Celery of its end. The message of the new run is behind them. The worker is stopped (SIGSTOP)
meanwhile. The measurement starts when it continues, and ends when the new run starts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench._worker import Worker, print_machine, wait, waiting_agent
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import Client
from openagents_worker.producer.handle import RunHandle

MAX_S = 1.0
LEASE_MS = "300000"  # the worker is stopped while the runs are submitted and cancelled


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table. Return 0 if the new run starts within a second."""
    parser = argparse.ArgumentParser(prog="python -m bench cancelled", description=__doc__)
    parser.add_argument("--runs", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--places", type=int, default=100)
    options = parser.parse_args(arguments)
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder,
        EmbeddedRedis(data_dir=Path(folder) / "redis") as server,
        Client(server.url) as client,
    ):
        print_machine(server.url)
        for number in range(options.rounds):
            client.store.redis.flushall()
            with Worker(
                Path(folder),
                server.url,
                waiting_agent(0),
                *("-c", str(options.places)),
                app="tasks",
                OPENAGENTS_LEASE_MS=LEASE_MS,
            ) as worker:
                found.append(_measure(client, worker, options.runs))
            print(f"  {number + 1}: {found[-1]}", flush=True)
    waited_s, cpu_s, unnotified, all_notified_s, all_cpu_s = (
        statistics.median(each) for each in zip(*found, strict=True)
    )
    print(f"\n{options.runs:,} cancelled runs, {options.places} slots, median of {options.rounds}\n")
    print("| until | s | CPU of the worker, s | runs whose end Celery does not know |\n|---|---|---|---|")
    print(f"| the new run starts | {waited_s:.2f} | {cpu_s:.2f} | {unnotified:.0f} |")
    print(f"| Celery is notified of every end | {all_notified_s:.2f} | {all_cpu_s:.2f} | 0 |")
    return 0 if waited_s <= MAX_S else 1


class Found(NamedTuple):
    """Seconds since the worker continues, and its CPU time until then."""

    waited_s: float
    cpu_s: float
    unnotified: int
    all_notified_s: float
    all_cpu_s: float


def _measure(client: Client, worker: Worker, runs: int) -> Found:
    def submit() -> RunHandle:
        return client.submit(RunRequest(agent_id="waits", session_id=uuid.uuid4().hex, input_text="go"))

    submit().wait(30)
    worker.pause()
    cancelled = [submit() for _ in range(runs)]
    for handle in cancelled:
        handle.cancel()
    new = submit()
    redis, keys = client.store.redis, client.store.keys

    def count_unnotified() -> int:
        pipeline = redis.pipeline(transaction=False)
        for handle in cancelled:
            pipeline.hexists(keys("run", handle.id), "untold")
        return sum(pipeline.execute())

    cpu_s, began = worker.cpu_s(), time.time()
    worker.go_on()
    wait(lambda: redis.hget(keys("run", new.id), "started"), "the new run has started")
    new_cpu_s, unnotified = worker.cpu_s() - cpu_s, count_unnotified()
    waited_s = (client.record(new.id).started_ms or 0) / 1000 - began
    wait(lambda: time.sleep(0.1) or not count_unnotified(), "Celery is notified of every end")
    return Found(waited_s, new_cpu_s, unnotified, time.time() - began, worker.cpu_s() - cpu_s)
