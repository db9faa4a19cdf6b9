"""`python -m chaos`: run a deployment under load and faults, audit it, write a report.

The exit code is 0 if nothing was lost, repeated, reordered or left behind, otherwise 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from chaos.audit import Audit, audit
from chaos.deployment import Deployment
from chaos.faults import Faults
from chaos.load import Load
from chaos.schedule import schedule
from openagents_worker.store.keys import ttl_violations

HERE = Path(__file__).resolve().parent
SETTLE_S = 240.0  # within which every accepted run must end after the last fault
IDLE_S = 60.0  # within which what is left must go, such as connections of workers that are gone
MORE_CONNECTIONS = 6  # than before: each worker opens one or two only when it needs them
MOST_GROWTH = 1.6  # of the resident memory of a worker
WARM_UP_RUNS = 60


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--lease-s", type=float, default=2.5)
    parser.add_argument("--runs-per-second", type=float, default=6)
    parser.add_argument("--faults-per-minute", type=float, default=40)
    parser.add_argument("--appendfsync", choices=("everysec", "always"), default="everysec")
    parser.add_argument("--sentinel", action="store_true", help="a master and a replica that fail over")
    parser.add_argument("--report", type=Path, default=HERE / "report.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        report, clean = _run(options, Path(folder))
    options.report.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({name: report[name] for name in ("faults", "runs", "violations")}, indent=2))
    print(f"{'clean' if clean else 'VIOLATIONS'}; the report is {options.report}")
    return 0 if clean else 1


def _run(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], bool]:
    began_at = time.time()
    faults_due = schedule(
        options.seed, options.minutes, per_minute=options.faults_per_minute, sentinel=options.sentinel
    )
    with Deployment(
        folder,
        workers=options.workers,
        lease_s=options.lease_s,
        appendfsync=options.appendfsync,
        sentinel=options.sentinel,
    ) as deployment:
        load = Load(deployment.client, options.seed, options.runs_per_second)
        load.warm_up(WARM_UP_RUNS)
        before = _Usage.of(deployment)
        faults = Faults(deployment, seed=options.seed)
        load.start()
        began = time.monotonic()
        with ThreadPoolExecutor(16, thread_name_prefix="fault") as injecting:
            for fault in faults_due:
                time.sleep(max(0.0, began + fault.at_s - time.monotonic()))
                injecting.submit(faults.inject, fault)
        load.stop()
        settled_s, stuck = _settle(load)
        found, endings = audit(
            deployment.client, load.accepted, stuck, deployment.effects.executions, faults.failovers
        )
        found.producer_problems = load.problems
        after = _check_growth(deployment, before, found)
        found.keys_without_ttl = ttl_violations(deployment.redis.data_url)
        if not found.clean():
            deployment.save_logs(options.report.with_suffix(".log"))
        report = {
            "commit": _commit(),
            "began_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began_at)),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "seed": options.seed,
            "minutes": options.minutes,
            "workers": options.workers,
            "lease_s": options.lease_s,
            "redis": "sentinel" if options.sentinel else f"appendfsync {options.appendfsync}",
            "faults": {
                "total": faults.done.total(),
                **dict(sorted(faults.done.items())),
                "without effect": faults.without_effect.total(),
                "not injected": faults.errors,
            },
            "runs": {"accepted": len(load.accepted), **dict(endings.most_common())},
            "executions": len(deployment.effects.executions),
            "worker_exits": len(deployment.exits),
            "repeated_operations": dict(load.repeated),
            "settled_s": round(settled_s, 1),
            "usage_before": asdict(before),
            "usage_after": asdict(after),
            "violations": found.counts(),
            "first_violations": {name: each[:20] for name, each in asdict(found).items() if each},
        }
    return report, found.clean() and not faults.errors


def _settle(load: Load) -> tuple[float, list[str]]:
    """The seconds until all runs have ended, and the runs that have not ended after `SETTLE_S`."""
    began = time.monotonic()
    while (open_runs := load.open_runs()) and time.monotonic() - began < SETTLE_S:
        time.sleep(0.3)
    return time.monotonic() - began, open_runs


@dataclass(frozen=True, slots=True)
class _Usage:
    """What a deployment without open runs uses."""

    connections: int
    worker_bytes: int
    redis_bytes: int

    @classmethod
    def of(cls, deployment: Deployment) -> Self:
        return cls(deployment.connections(), deployment.worker_bytes(), deployment.redis_bytes())


def _check_growth(deployment: Deployment, before: _Usage, found: Audit) -> _Usage:
    """What is used afterwards, when the connections of lost workers had time to close."""
    with suppress(TimeoutError):
        most = before.connections + MORE_CONNECTIONS
        deployment.wait_for(lambda: deployment.connections() <= most, "connections are closed", IDLE_S)
    after = _Usage.of(deployment)
    if after.connections > before.connections + MORE_CONNECTIONS:
        found.growth.append(f"{after.connections} connections to Redis, {before.connections} before")
    if after.worker_bytes > before.worker_bytes * MOST_GROWTH:
        found.growth.append(f"a worker has {after.worker_bytes} bytes, {before.worker_bytes} before")
    return after


def _commit() -> str:
    command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603


if __name__ == "__main__":
    sys.exit(main())
