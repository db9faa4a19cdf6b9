"""A limit of the fleet: how evenly several worker processes together send requests to a model.

All runs wait in the queue before the first worker starts, so this includes a cold start. One tenant has
submitted three quarters of them, and then another tenant the rest. The model is a server in a process of its
own, which writes down when each request arrives. Redis, workers and the server share this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from bench._worker import print_machine
from openagents_worker.local.stack import Stack
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import Client

WINDOW_S = 10.0
MAX_OVER = 0.10  # of a window's share
MAX_OFF = 0.05  # of the rate, over the whole time
MIN_TURNS = 0.90  # of the smaller tenant's half, while both wait
FIRST, SECOND = "flood", "other"
RESERVE = 1.15  # runs in the queue, as a factor of those that the limit allows in the time


def answer(_: Any) -> dict[str, Any]:
    """The reply of the model server."""
    return {"text": "done"}


class Arrival(NamedTuple):
    """A request at the model server: its time in seconds, and the tenant of its run."""

    at_s: float
    tenant: str


def main(arguments: Sequence[str]) -> int:
    """Print the table. Return 0 if all targets are met."""
    parser = argparse.ArgumentParser(prog="python -m bench limits", description=__doc__)
    parser.add_argument("--workers", type=int, default=4, help="number of worker processes")
    parser.add_argument("--rate", type=int, default=600, help="requests per minute")
    parser.add_argument("--seconds", type=float, default=120, help="time from the first request on")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="openagents-bench-") as folder:
        arrivals = _measure(Path(folder), options.workers, options.rate, options.seconds)
    return 0 if _report(arrivals, options.rate, options.seconds) else 1


def _measure(folder: Path, workers: int, rate: int, seconds: float) -> list[Arrival]:
    """Let the workers execute the runs for this time. Returns the requests in the order of their arrival."""
    log = folder / "requests.jsonl"
    count = round(rate * seconds / 60 * RESERVE)
    env = {**os.environ, "OPENAGENTS_CONFIG": str(folder / "agents.json"), "OPENAGENTS_LOG_LEVEL": "ERROR"}
    with Stack(data_dir=folder / "redis", env=env, say=lambda name, line: None) as stack:
        print_machine(stack.redis_url)
        url = stack.start_model_server("bench.limits:answer", log)
        (folder / "agents.json").write_text(json.dumps({"agents": [_agent(url, rate)]}))
        tenants: dict[str, str] = {}
        with Client(settings=stack.settings) as client:
            for number in range(count):
                tenant = FIRST if number < count * 3 / 4 else SECOND
                request = RunRequest(
                    agent_id="limited", session_id=f"s{number}", input_text="go", tenant=tenant
                )
                tenants[client.submit(request).id] = tenant
        for number in range(workers):
            stack.start_worker(f"w{number}")
        while not (arrivals := _arrivals(log, tenants)) or time.time() < arrivals[0].at_s + seconds:
            time.sleep(1)
        return _arrivals(log, tenants)


def _agent(url: str, rate: int) -> dict[str, Any]:
    llm = {"provider": "openai_compatible", "model": "m", "api_base": url}
    return {
        "id": "limited",
        "name": "Limited",
        "llm": {**llm, "pricing": {"input": 1, "output": 1}, "limits": {"requests_per_minute": rate}},
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
    }


def _arrivals(log: Path, tenants: dict[str, str]) -> list[Arrival]:
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return sorted(
        Arrival(line["at"], tenants[line["key"].partition(":")[0]])
        for line in found
        if line["event"] == "received"
    )


def _report(arrivals: Sequence[Arrival], rate: int, seconds: float) -> bool:
    began_s = arrivals[0].at_s
    times = [each.at_s for each in arrivals if each.at_s < began_s + seconds]
    allowed, share = rate * seconds / 60, rate * WINDOW_S / 60
    fullest = max(_in_window(times, at) for at in range(len(times)))
    first_window = _in_window(times, 0)
    turns = _turns(arrivals)
    gaps = [after - before for before, after in pairwise(times)]
    print(f"\n{rate} requests a minute, {seconds:.0f} s\n")
    print("| | measured | target |\n|---|---|---|")
    print(f"| requests | {len(times)} | {allowed:.0f} ± {MAX_OFF:.0%} |")
    print(f"| fullest {WINDOW_S:.0f} s | {fullest} | at most {share * (1 + MAX_OVER):.0f} |")
    print(f"| first {WINDOW_S:.0f} s | {first_window} | at most {share * (1 + MAX_OVER):.0f} |")
    print(f"| the second tenant's part of its half | {turns:.2f} | at least {MIN_TURNS:.2f} |")
    print(f"| median and longest gap, ms | {statistics.median(gaps) * 1000:.0f}, {max(gaps) * 1000:.0f} | |")
    is_even = fullest <= share * (1 + MAX_OVER)
    return is_even and abs(len(times) - allowed) <= allowed * MAX_OFF and turns >= MIN_TURNS


def _in_window(times: Sequence[float], first: int) -> int:
    """The number of requests in the window that begins with this one."""
    return sum(1 for at in times[first:] if at < times[first] + WINDOW_S)


def _turns(arrivals: Sequence[Arrival]) -> float:
    """The requests of the second tenant, as a part of half of all, while many of its runs wait: from its
    first request until nine tenths of its requests were sent."""
    of_second = [at for at, each in enumerate(arrivals) if each.tenant == SECOND]
    both = Counter(each.tenant for each in arrivals[of_second[0] : of_second[len(of_second) * 9 // 10]])
    return both[SECOND] / (both.total() / 2)
