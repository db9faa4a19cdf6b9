"""Runs a second with 1, 2 and 4 worker processes: runs that only wait, and runs that only work.

Runs that wait for a model scale with the slots that are there; runs that work, until the cores are used.
Redis, the workers and the model (in process, scripted) share this machine: read the ratios, not the rates.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path

from openagents_worker import Client, RunRequest
from openagents_worker.cli.stack import Stack

WAITING_MS = 400
SLOTS = 8
ROUNDS = 3


def main(options: list[str]) -> int:
    """Print the table; the exit code says whether more processes meant more throughput."""
    counts = (1, 2) if "--short" in options else (1, 2, 4)
    with tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder:
        agents = Path(folder) / "agents.json"
        agents.write_text(json.dumps({"agents": [_agent("waits", WAITING_MS), _agent("works", 0)]}))
        env = {**os.environ, "OPENAGENTS_CONFIG": str(agents), "OPENAGENTS_LOG_LEVEL": "ERROR"}
        with Stack(env=env) as stack:
            print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
            print("| workers | waiting runs/s | times one worker | working runs/s | times one worker |")
            print("|---|---|---|---|---|")
            waiting: list[float] = []
            working: list[float] = []
            for count in counts:
                while len(stack.workers) < count:
                    stack.start_worker(f"w{len(stack.workers) + 1}", concurrency=SLOTS)
                waiting.append(_median(stack, "waits", 4 * SLOTS * count))
                working.append(_median(stack, "works", 150))
                print(
                    f"| {count} | {waiting[-1]:.1f} | {waiting[-1] / waiting[0]:.2f} "
                    f"| {working[-1]:.1f} | {working[-1] / working[0]:.2f} |",
                    flush=True,
                )
    return 0 if waiting[1] > 1.5 * waiting[0] else 1


def _agent(name: str, latency_ms: int) -> dict[str, object]:
    """An agent whose model asks for one calculation and answers."""
    script = [{"tool_calls": [{"name": "calc", "arguments": {"expression": "6*7"}}]}, {"text": "42"}]
    return {
        "id": name,
        "name": name,
        "llm": {"provider": "scripted", "script": script, "latency_ms": latency_ms},
        "pattern": {"type": "react"},
        "memory": {"type": "buffer"},
        "tools": [{"id": "calc", "type": "calc"}],
    }


def _median(stack: Stack, agent_id: str, runs: int) -> float:
    return statistics.median(_rate(stack, agent_id, runs) for _ in range(ROUNDS))


def _rate(stack: Stack, agent_id: str, runs: int) -> float:
    """Runs a second from the first submission to the last end, every run in a session of its own."""
    round_id = uuid.uuid4().hex[:8]
    with Client(stack.redis_url) as client:
        started = time.perf_counter()
        handles = [
            client.submit(RunRequest(agent_id=agent_id, session_id=f"{round_id}-{n}", input_text="go"))
            for n in range(runs)
        ]
        for handle in handles:
            result = handle.wait(timeout=120)
            if not result.ok:
                sys.exit(f"a run failed: {result.error_details}")
        return runs / (time.perf_counter() - started)
