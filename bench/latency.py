"""From `.delay()` to a run's first step, on a worker that waits for work; beside a plain Celery task.

The run's pattern is one tool, which says when it was called; the task says when it began. Both go to the same
worker process, in turns. Everything is on one machine, so one clock tells both times.
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

from bench._worker import Worker, tell_machine
from openagents_worker.celery.app import make_worker_app
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import Client
from openagents_worker.settings import load_settings
from openagents_worker.tools.base import ToolContext, ToolPlugin

MOST_P50_MS = 10.0
WARM_UP = 20
STARTED = "bench:started"


class Stamp(ToolPlugin):
    """Says when it was called: seconds since 1970."""

    name = "stamp"
    description = "Tells the time."

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": {}}

    async def invoke(self, params: dict[str, Any], context: ToolContext | None) -> float:
        return time.time()


class FirstStep:
    """A pattern that calls that tool and is done."""

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
    """Print the table; 0 when half of all runs are at work within ten milliseconds."""
    parser = argparse.ArgumentParser(prog="python -m bench latency", description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder,
        EmbeddedRedis(data_dir=Path(folder) / "redis") as server,
        Worker(Path(folder), server.url, AGENT, app="bench.latency") as worker,
        Client(server.url) as client,
    ):
        tell_machine(server.url)
        runs, tasks = _measure(client, server.url, options.runs + WARM_UP)
        megabytes = worker.megabytes()
    print(f"\nms from the producer's call to the work's beginning, {options.runs} of each in turns\n")
    print("| | p50 | p90 | p99 |\n|---|---|---|---|")
    _tell("a run's first step", runs)
    _tell("a plain Celery task", tasks)
    print(f"\nThe worker takes {megabytes:.0f} MB.")
    return 0 if statistics.median(runs) <= MOST_P50_MS else 1


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
            time.sleep(0.01)  # the worker has told Celery of the end, and waits again
            began = time.time()
            sender.send_task("bench.latency.started", queue="agents", producer=producer)
            _, at = store.blpop([STARTED], timeout=30)
            tasks.append((float(at) - began) * 1000)
            time.sleep(0.01)
    sender.close()
    return runs[WARM_UP:], tasks[WARM_UP:]


def _tell(what: str, times_ms: Sequence[float]) -> None:
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
