"""How long runs stand still when their worker is killed: the slowest of many kills, under any backlog.

A run counts as running again when the model server has got its interrupted call once more.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openagents_worker.models import RunState
from openagents_worker.store.runs import read_states
from tests.faults.world import World, table
from tests.waiting import wait_for

ALLOWED_S = 1.0  # beyond the lease
CALL_S = 600.0  # how long the model takes for what the killed worker waits for: longer than all else here
PACKAGES = ("openagents-worker", "celery", "kombu", "redis", "hiredis")


def main(arguments: Sequence[str]) -> int:
    """Print the table; 0 when all runs always ran again within the lease and a second."""
    parser = argparse.ArgumentParser(prog="python -m bench recovery", description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", type=int, default=100, help="live runs of the worker that is killed")
    parser.add_argument("--lease-s", type=float, nargs="+", default=[3.0, 10.0])
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 10_000], help="messages in the queue")
    options = parser.parse_args(arguments)
    _tell_machine()
    rows = [
        _measure(lease_s, waiting, options.kills, options.runs)
        for lease_s in options.lease_s
        for waiting in options.waiting
    ]
    table(
        f"{options.kills} kills of a worker with {options.runs} live runs, until all of them run again", rows
    )
    return 0 if all(row["within"] for row in rows) else 1


def _measure(lease_s: float, waiting: int, kills: int, runs: int) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        World(Path(folder), workers=1, lease_ms=int(lease_s * 1000), concurrency=runs) as world,
    ):
        world.start()
        world.restarts = False
        times_s = sorted(_kill_once(world, number, waiting, runs) for number in range(kills))
    return {
        "lease s": lease_s,
        "waiting": waiting,
        "fastest s": round(times_s[0], 2),
        "median s": round(times_s[len(times_s) // 2], 2),
        "slowest s": round(times_s[-1], 2),
        "of the lease": round(times_s[-1] / lease_s, 2),
        "within": times_s[-1] <= lease_s + ALLOWED_S,
    }


def _kill_once(world: World, number: int, waiting: int, runs: int) -> float:
    """Seconds from the death of a fully used worker until a spare one works on all of its runs."""
    victim = world.ready()[0]
    live = [f"live-{number}-{n}" for n in range(runs)]
    asked = _Asked(world, live)
    for run_id in live:
        world.submit(run_id, latency_ms=int(CALL_S * 1000))
    wait_for(lambda: len(asked.times()) == runs, f"{runs} runs wait for the model", 120)
    for n in range(waiting - _waiting(world)):
        world.submit(f"waiting-{number}-{n}")
    world.add_worker()

    killed_at = time.time()
    world.kill(victim)
    wait_for(lambda: len(asked.times(since=killed_at)) == runs, "all of them run again", 120)
    took_s = max(asked.times(since=killed_at).values()) - killed_at

    _clear(world, live)
    print(
        f"  kill {number + 1}: {took_s:.2f} s, {_waiting(world)} messages wait", file=sys.stderr, flush=True
    )
    return took_s


class _Asked:
    """When the model was asked by these runs, from now on."""

    def __init__(self, world: World, run_ids: Sequence[str]) -> None:
        self._world = world
        self._from = len(world.model.log)
        self._run_ids = set(run_ids)

    def times(self, since: float = 0.0) -> dict[str, float]:
        """The first time after `since`, by run."""
        found: dict[str, float] = {}
        for entry in self._world.model.log[self._from :]:
            if entry["event"] == "received" and entry["at"] > since:
                run_id = str(entry["key"]).partition(":")[0]
                if run_id in self._run_ids:
                    found.setdefault(run_id, entry["at"])
        return found


def _waiting(world: World) -> int:
    return int(world.client.store.ask(lambda r: r.llen(world.client.settings.queue)))


def _clear(world: World, run_ids: Sequence[str]) -> None:
    for run_id in run_ids:
        world.client.cancel(run_id)

    def all_cancelled() -> bool:
        states = Counter(read_states(world.client.store, run_ids).values())
        return states[RunState.CANCELLED] == len(run_ids)

    wait_for(all_cancelled, "the interrupted runs are cancelled", 60)


def _tell_machine() -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {packages}")
    print(f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, {_processor()}")
    print(f"load when it began: {os.getloadavg()[0]:.1f}; anything above a few tenths is in the figures")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
