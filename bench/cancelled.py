"""How long a thousand and a half cancelled runs keep a new run waiting.

All of them wait in the queue of one worker when they are cancelled: each leaves its own message and one that
notifies Celery of its end. Behind them stands the new run. The worker is stopped (SIGSTOP) meanwhile, so the
clock begins when it may go on; what it computes until the new run begins is what the wait is made of.
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

from bench._worker import Worker, tell_machine, wait, waiting_agent
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import Client
from openagents_worker.producer.handle import RunHandle

MOST_S = 1.0
LEASE_MS = "300000"  # the worker stands still while the runs are submitted and cancelled


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table; 0 when the new run begins within a second."""
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
        tell_machine(server.url)
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
    waited_s, cpu_s, untold, all_told_s, all_cpu_s = (
        statistics.median(each) for each in zip(*found, strict=True)
    )
    print(f"\n{options.runs:,} cancelled runs, {options.places} places, median of {options.rounds}\n")
    print("| until | s | worker's CPU, s | Celery is still to be notified of |\n|---|---|---|---|")
    print(f"| the new run begins | {waited_s:.2f} | {cpu_s:.2f} | {untold:.0f} |")
    print(f"| Celery is notified of every end | {all_told_s:.2f} | {all_cpu_s:.2f} | 0 |")
    return 0 if waited_s <= MOST_S else 1


class Found(NamedTuple):
    """Seconds from when the worker may go on, and its processor time until then."""

    waited_s: float
    cpu_s: float
    untold: int
    all_told_s: float
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

    def untold() -> int:
        pipeline = redis.pipeline(transaction=False)
        for handle in cancelled:
            pipeline.hexists(keys("run", handle.id), "untold")
        return sum(pipeline.execute())

    cpu_s, began = worker.cpu_s(), time.time()
    worker.go_on()
    wait(lambda: redis.hget(keys("run", new.id), "started"), "the new run has begun")
    new_cpu_s, left = worker.cpu_s() - cpu_s, untold()
    waited_s = (client.record(new.id).started_ms or 0) / 1000 - began
    wait(lambda: time.sleep(0.1) or not untold(), "Celery is notified of every end")
    return Found(waited_s, new_cpu_s, left, time.time() - began, worker.cpu_s() - cpu_s)
