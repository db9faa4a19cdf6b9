"""The demo: a run from `run_agent.delay` to its result, then a second run whose worker is killed.

It starts everything on this machine, counts the effects of the runs from outside, and stops everything.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openagents_worker import Client
from openagents_worker.errors import RunNotFound
from openagents_worker.events import RunEvent
from openagents_worker.local.child_process import ChildProcess
from openagents_worker.local.stack import Stack

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True)
class Report:
    """What was counted outside of the workers for one run. `requests` is 0 with a model of somebody else."""

    completed: bool
    effects: int
    requests: int
    repeated: int

    @property
    def good(self) -> bool:
        return self.completed and self.repeated == 0


def main() -> int:
    """Execute both parts. Return 0 if each run completed and no call was executed twice."""
    with tempfile.TemporaryDirectory(prefix="openagents-demo-") as folder, _stack(Path(folder)) as stack:
        files = Path(folder)
        _print_line("Redis", stack.redis_url)
        model_log = _start_model(stack, files)
        workers = [_start_worker(stack, "worker-1")]
        flower_url = stack.start_flower()
        _print_line("Flower", flower_url)

        _print_title("Part one: a producer process submits a run with run_agent.delay")
        run_id = _new_id("demo")
        first = _report(_submit(stack, run_id, files), model_log, files / "ledger.jsonl")

        _print_title("Part two: the same request, but the worker is killed during the run (SIGKILL)")
        (files / "ledger.jsonl").unlink()
        workers.append(_start_worker(stack, "worker-2"))
        run_id = _new_id("killed")
        killer = threading.Thread(target=_kill_its_worker, args=(stack, run_id, workers))
        killer.start()
        result = _submit(stack, run_id, files)
        killer.join()
        second = _report(result, model_log, files / "ledger.jsonl")
        _print_verdict(second)
        _wait_for_enter(flower_url)
    print()
    _print_line("stopped", "workers, Flower, model and Redis")
    return 0 if first.good and second.good else 1


def _print_verdict(report: Report) -> None:
    verdict = (
        "the worker was killed in the middle of the run, and another one finished it: "
        f"{report.effects} effects and {report.requests} model requests, {report.repeated} repeated"
    )
    good = "" if report.good else "NOT as promised: "
    print(f"\n{BOLD if sys.stdout.isatty() else ''}{good}{verdict}{PLAIN if sys.stdout.isatty() else ''}")


def _wait_for_enter(flower_url: str) -> None:
    """On a terminal, leave everything running until somebody has looked at it."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            input(f"\nFlower shows both runs at {flower_url}; Enter stops everything ")


def _stack(folder: Path) -> Stack:
    return Stack(
        env={
            **os.environ,
            "OPENAGENTS_CONFIG": str(HERE / "agents.json"),
            "OPENAGENTS_LEASE_MS": "3000",  # a dead worker is detected after at most three seconds
            "OPENAGENTS_LOG_LEVEL": "ERROR",
            "DEMO_LEDGER": str(folder / "ledger.jsonl"),
            "DEMO_DOCUMENTS": str(ROOT / "docs"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
    )


def _start_worker(stack: Stack, name: str) -> ChildProcess:
    worker = stack.start_worker(name)
    _print_line(name, f"pid {worker.pid}, registered")
    return worker


def _new_id(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:8]}"


def _start_model(stack: Stack, folder: Path) -> Path | None:
    """Start the model server unless the environment has an API key. Return the path of its log, or None."""
    if os.environ.get("OPENAI_API_KEY"):
        _print_line("model", os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1"))
        return None
    log = folder / "model.jsonl"
    url = stack.start_model_server("examples.demo.model:reply", log, token_delay_ms=15)
    stack.set_env(OPENAI_BASE_URL=url, OPENAI_API_KEY="no-key-needed")
    _print_line("model", f"{url} (scripted; set OPENAI_API_KEY to use a real model)")
    return log


def _submit(stack: Stack, run_id: str, folder: Path) -> dict[str, Any]:
    """Run the producer in a separate process that prints to this terminal. Return the result of its run."""
    result = folder / f"{run_id}.json"
    subprocess.run(
        [sys.executable, str(HERE / "producer.py"), run_id, f"session-of-{run_id}", str(result)],
        env={**os.environ, "OPENAGENTS_REDIS_URL": stack.redis_url},
        check=True,
        timeout=120,
    )
    return dict(json.loads(result.read_text()))


def _kill_its_worker(stack: Stack, run_id: str, workers: list[ChildProcess]) -> None:
    """Kill the worker that executes the run, as soon as its second ledger entry is committed."""
    entries = 0
    for event in _events_of(stack, run_id):
        entries += event.name == "tool.succeeded" and event.payload["tool_id"] == "ledger"
        if entries == 2:
            victim = next(worker for worker in workers if str(event.worker).startswith(f"{worker.name}@"))
            victim.kill()
            print(f"\n    >>> kill -9 {victim.pid} ({victim.name})\n", file=sys.stderr, flush=True)
            return


def _events_of(stack: Stack, run_id: str) -> Iterator[RunEvent]:
    with Client(stack.redis_url) as client:
        while True:
            try:
                yield from client.handle(run_id).events()
                return
            except RunNotFound:  # the producer has not submitted the run yet
                time.sleep(0.02)


def _report(result: dict[str, Any], model_log: Path | None, ledger: Path) -> Report:
    """Count how often the ledger and the model were called for the run, and print it."""
    keys = [json.loads(line)["key"] for line in ledger.read_text().splitlines()]
    print()
    _print_line("stop reason", result["stop_reason"])
    _print_line("artifacts", ", ".join(artifact["name"] for artifact in result["artifacts"]))
    _print_line("ledger", f"{len(keys)} entries, {_repeats(keys)} duplicates")
    requests = [] if model_log is None else _requests_of(result["run_id"], model_log)
    if requests:
        _print_line("model", f"{len(requests)} requests, {_repeats(requests)} duplicates")
    repeated = _repeats(keys) + _repeats(requests)
    return Report(result["stop_reason"] == "completed", len(keys), len(requests), repeated)


def _requests_of(run_id: str, model_log: Path) -> list[str]:
    lines = [json.loads(line) for line in model_log.read_text().splitlines()]
    keys = [str(line["key"]) for line in lines if line["event"] == "received"]
    return [key for key in keys if key.startswith(f"{run_id}:")]


def _repeats(keys: Any) -> int:
    return sum(count - 1 for count in collections.Counter(keys).values())


def _print_title(text: str) -> None:
    print(f"\n=== {text}\n", flush=True)


def _print_line(name: str, text: str) -> None:
    print(f"{name:>12}  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
