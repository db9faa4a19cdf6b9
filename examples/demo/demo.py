"""The demo: a run from `run_agent.delay` to its result, then the same with its worker killed on the way.

Starts everything it needs on this machine, shows it, counts what happened from outside, and leaves nothing.
"""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openagents_worker import Client
from openagents_worker.errors import RunNotFound
from openagents_worker.events import RunEvent
from openagents_worker.local.child_process import ChildProcess
from openagents_worker.local.stack import Stack

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def main() -> int:
    """Both acts; 0 when both did what the README says."""
    with tempfile.TemporaryDirectory(prefix="openagents-demo-") as folder, _stack(Path(folder)) as stack:
        here = Path(folder)
        _say("Redis", stack.redis_url)
        model_log = _start_model(stack, here)
        workers = [_start_worker(stack, "worker-1")]
        _say("Flower", stack.start_flower())

        _title("Act one: a run, from another process, through run_agent.delay")
        run_id = _new_id("demo")
        good = _tell(_submit(stack, run_id, here), model_log, here / "ledger.jsonl")

        _title("Act two: the same again, and its worker is killed in the middle (SIGKILL)")
        (here / "ledger.jsonl").unlink()
        workers.append(_start_worker(stack, "worker-2"))
        run_id = _new_id("killed")
        killer = threading.Thread(target=_kill_its_worker, args=(stack, run_id, workers))
        killer.start()
        result = _submit(stack, run_id, here)
        killer.join()
        good = _tell(result, model_log, here / "ledger.jsonl") and good
    print()
    _say("the end", "workers, Flower, model and Redis are stopped")
    return 0 if good else 1


def _stack(folder: Path) -> Stack:
    return Stack(
        env={
            **os.environ,
            "OPENAGENTS_CONFIG": str(HERE / "agents.json"),
            "OPENAGENTS_LEASE_MS": "3000",  # a dead worker is noticed within three seconds
            "OPENAGENTS_LOG_LEVEL": "ERROR",
            "DEMO_LEDGER": str(folder / "ledger.jsonl"),
            "DEMO_DOCUMENTS": str(ROOT / "docs"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
    )


def _start_worker(stack: Stack, name: str) -> ChildProcess:
    worker = stack.start_worker(name)
    _say(name, f"pid {worker.pid}, registered")
    return worker


def _new_id(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:8]}"


def _start_model(stack: Stack, folder: Path) -> Path | None:
    """The model server where no provider's key is there; returns its log."""
    if os.environ.get("OPENAI_API_KEY"):
        _say("model", os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1"))
        return None
    log = folder / "model.jsonl"
    url = stack.start_model_server("examples.demo.model:reply", log, token_delay_ms=15)
    stack.set_env(OPENAI_BASE_URL=url, OPENAI_API_KEY="no-key-needed")
    _say("model", f"{url} (scripted; set OPENAI_API_KEY to ask a real one)")
    return log


def _submit(stack: Stack, run_id: str, folder: Path) -> dict[str, Any]:
    """Run the producer in a process of its own, its output on our terminal; returns the result."""
    result = folder / f"{run_id}.json"
    subprocess.run(
        [sys.executable, str(HERE / "producer.py"), run_id, f"session-of-{run_id}", str(result)],
        env={**os.environ, "OPENAGENTS_REDIS_URL": stack.redis_url},
        check=True,
        timeout=120,
    )
    return dict(json.loads(result.read_text()))


def _kill_its_worker(stack: Stack, run_id: str, workers: list[ChildProcess]) -> None:
    """Kill the worker that carries the run, once the second entry in the ledger is a committed step."""
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
            except RunNotFound:  # its producer is only just starting
                time.sleep(0.02)


def _tell(result: dict[str, Any], model_log: Path | None, book: Path) -> bool:
    """What happened, counted by the model and the ledger themselves; whether it is what was promised."""
    run_id = result["run_id"]
    keys = [json.loads(line)["key"] for line in book.read_text().splitlines()]
    print()
    _say("stop reason", result["stop_reason"])
    _say("artifacts", ", ".join(artifact["name"] for artifact in result["artifacts"]))
    _say("ledger", f"{len(keys)} entries, {_repeats(keys)} of them twice")
    good = result["stop_reason"] == "completed" and _repeats(keys) == 0
    if model_log is not None:
        lines = [json.loads(line) for line in model_log.read_text().splitlines()]
        asked = (line["key"] for line in lines if line["event"] == "received")
        replies = [key for key in asked if key.startswith(f"{run_id}:")]
        _say("model", f"asked {len(replies)} times, {_repeats(replies)} of them again")
        good = good and _repeats(replies) == 0
    return good


def _repeats(keys: Any) -> int:
    return sum(count - 1 for count in collections.Counter(keys).values())


def _title(text: str) -> None:
    print(f"\n=== {text}\n", flush=True)


def _say(name: str, text: str) -> None:
    print(f"{name:>12}  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
