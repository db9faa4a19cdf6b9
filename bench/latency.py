"""The time from `Client.submit` to the first step of a run on an idle worker, beside a plain Celery task.

The pattern of the run calls one tool, which returns the time of the call. The task returns the time of its
start. Both are executed alternately by the same worker process. All processes are on one machine and use one
clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from bench._worker import Worker, print_machine
from openagents_worker.celery.app import make_worker_app
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings
from openagents_worker.tools.base import ToolContext, ToolPlugin

MAX_P50_MS = 10.0
WARM_UP = 20
STARTED = "bench:started"


class Stamp(ToolPlugin):
    """Returns the time of the call in seconds since the epoch."""

    name = "stamp"
    description = "Returns the time."

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": {}}

    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> float:
        return time.time()


class FirstStep:
    """A pattern that calls the tool `stamp` once."""

    context: Any

    def __init__(self, config: Any = None) -> None:
        del config

    async def execute(self) -> Any:
        return await self.context.tools["stamp"].invoke({})


AGENT = {
    "id": "stamps",
    "name": "Stamps",
    "llm": {"provider": "scripted", "script": [{"text": "done"}]},
    "memory": {"type": "buffer"},
    "pattern": {"impl": "bench.latency.FirstStep"},
    "tools": [{"id": "stamp", "impl": "bench.latency.Stamp"}],
}


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table. Return 0 if half of the runs start within ten milliseconds."""
    parser = argparse.ArgumentParser(prog="python -m bench latency", description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder,
        EmbeddedRedis(data_dir=Path(folder) / "redis") as server,
        Worker(Path(folder), server.url, AGENT, app="bench.latency") as worker,
        Client(server.url) as client,
    ):
        print_machine(server.url)
        runs, tasks = _measure(client, server.url, options.runs + WARM_UP)
        megabytes = worker.megabytes()
    print(f"\nms from the call in the producer to the start in the worker, {options.runs} of each\n")
    print("| | p50 | p90 | p99 |\n|---|---|---|---|")
    _print_row("a run's first step", runs)
    _print_row("a plain Celery task", tasks)
    ratio = statistics.median(runs) / statistics.median(tasks)
    print(f"\nThe median of the runs is {ratio:.1f} times that of the tasks.")
    print(f"The worker uses {megabytes:.0f} MB.")
    return 0 if statistics.median(runs) <= MAX_P50_MS else 1


def _measure(client: Client, url: str, count: int) -> tuple[list[float], list[float]]:
    runs, tasks = [], []
    sender = Celery("sender", broker=url, set_as_current=False)
    with sender.producer_pool.acquire(block=True) as producer, redis.Redis.from_url(url) as store:
        for _ in range(count):
            began = time.time()
            handle = client.submit(
                RunRequest(agent_id="stamps", session_id=uuid.uuid4().hex, input_text="go")
            )
            runs.append((handle.wait(30).final_output - began) * 1000)
            time.sleep(0.01)  # until the worker has reported the end to Celery and is idle again
            began = time.time()
            sender.send_task("bench.latency.started", queue="agents", producer=producer)
            _, at = store.blpop([STARTED], timeout=30)
            tasks.append((float(at) - began) * 1000)
            time.sleep(0.01)
    sender.close()
    return runs[WARM_UP:], tasks[WARM_UP:]


def _print_row(what: str, times_ms: Sequence[float]) -> None:
    cuts = statistics.quantiles(times_ms, n=100)
    print(f"| {what} | {cuts[49]:.1f} | {cuts[89]:.1f} | {cuts[98]:.1f} |")


# --- what the worker runs: this module is its application ------------------------------------------------


def _worker_app() -> Celery:
    app = make_worker_app(load_settings())

    async def started() -> None:
        at = time.time()
        with redis.Redis.from_url(app.conf.broker_url) as store:
            store.rpush(STARTED, at)

    app.task(started, name="bench.latency.started")
    return app


if "worker" in sys.argv:
    app = _worker_app()
