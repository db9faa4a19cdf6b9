"""One chaos run: start a deployment, inject the faults under load, wait for the end of all runs, audit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from chaos.audit import audit
from chaos.deployment import Deployment
from chaos.evidence import Audit, Evidence
from chaos.faults import Faults
from chaos.load import Load
from chaos.people import People
from chaos.redis_servers import AppendFsync
from chaos.schedule import schedule
from openagents_worker.models import Decision
from openagents_worker.store.ttl import ttl_violations

__all__ = ["ChaosRun", "Options", "chaos_run"]

SETTLE_S = 240.0  # within which every accepted run must end after the last fault
IDLE_S = 60.0  # within which what is left must go, such as connections of workers that have ended
CONNECTIONS_OF_WORKER = 30  # a worker's pools keep what they opened at their busiest moment
CONNECTIONS_OF_PRODUCERS = (
    35  # nine threads, each with one to Redis and some with one to the broker; watchers
)
MOST_GROWTH = 1.6  # of the resident memory of a worker
WARM_UP_RUNS = 60
FAULTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What is run. The same options give the same schedule and the same load."""

    seed: int = 1
    minutes: float = 10
    workers: int = 3
    lease_s: float = 2.5
    runs_per_second: float = 6
    faults_per_minute: float = 40
    appendfsync: AppendFsync = "everysec"
    sentinel: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """What a deployment without open runs uses."""

    connections: int
    worker_bytes: int
    redis_bytes: int

    @classmethod
    def of(cls, deployment: Deployment) -> Self:
        return cls(deployment.connections(), deployment.worker_bytes(), deployment.redis_bytes())


class ChaosRun:
    """A deployment and its load. `inject` does the damage; `audit` says what is wrong afterwards."""

    def __init__(self, deployment: Deployment, options: Options) -> None:
        self.deployment = deployment
        self.load = Load(deployment.client, options.seed, options.runs_per_second)
        self.faults = Faults(deployment, seed=options.seed)
        self.people = People(
            deployment.client, self.load, deployment.effects, self._may_be_lost, options.seed
        )
        self._options = options
        self._settled_s = 0.0
        self._stuck: list[str] = []
        self._before = self._after = Usage(0, 0, 0)

    def inject(self) -> None:
        """Inject every fault of the schedule under load; returns when all runs have ended."""
        options = self._options
        faults = schedule(
            options.seed, options.minutes, per_minute=options.faults_per_minute, sentinel=options.sentinel
        )
        self.load.warm_up(WARM_UP_RUNS)
        self._before = Usage.of(self.deployment)
        self.load.start()
        self.people.start()
        began = time.monotonic()
        with ThreadPoolExecutor(FAULTS_AT_ONCE, thread_name_prefix="fault") as injecting:
            for fault in faults:
                time.sleep(max(0.0, began + fault.at_s - time.monotonic()))
                injecting.submit(self.faults.inject, fault)
        self.load.stop()
        self._settle()
        self.people.stop()

    def audit(self) -> tuple[Audit, Counter[str]]:
        """The violations, and how many runs ended in which way."""
        found, endings = audit(self.deployment.client, self.evidence())
        found.producer_problems = [*self.load.repeating.problems, *self.people.repeating.problems]
        found.keys_without_ttl = ttl_violations(self.deployment.redis.data_url)
        self._check_growth(found)
        return found, endings

    def evidence(self) -> Evidence:
        """What everybody outside the workers knows."""
        effects, people = self.deployment.effects, self.people
        return Evidence(
            accepted=self.load.accepted,
            stuck=self._stuck,
            executions=effects.executions,
            not_found=effects.not_found,
            answers=people.answers,
            resolved=people.resolved,
            sent=people.sent,
            steered=people.steered,
            data_losses=self.faults.data_losses,
            has_replica=self.deployment.watched is not None,
        )

    def _may_be_lost(self, written: float) -> bool:
        return self.evidence().may_be_missing(written)

    def report(self, found: Audit, endings: Counter[str]) -> dict[str, Any]:
        """Everything as plain JSON."""
        return {
            "options": asdict(self._options),
            "faults": {
                "total": self.faults.done.total(),
                **dict(sorted(self.faults.done.items())),
                "without effect": self.faults.without_effect.total(),
                "not injected": self.faults.errors,
            },
            "runs": {"accepted": len(self.load.accepted), **dict(endings.most_common())},
            "executions": len(self.deployment.effects.executions),
            "worker_exits": len(self.deployment.exits),
            "decided": self.decided(),
            "repeated_operations": dict(self.load.repeating.repeated + self.people.repeating.repeated),
            "settled_s": round(self._settled_s, 1),
            "usage_before": asdict(self._before),
            "usage_after": asdict(self._after),
            "violations": found.counts(),
            "first_violations": {name: each[:20] for name, each in asdict(found).items() if each},
        }

    def decided(self) -> dict[str, int]:
        """How often people and systems outside have acted on runs."""
        people = self.people
        mine = Counter(f"approvals: {_name_of(each.decision)}" for each in people.answers if each.is_mine)
        mine["approvals: somebody else was first"] = sum(not each.is_mine for each in people.answers)
        mine += Counter(f"unknown outcomes: {each.action}" for each in people.resolved)
        mine["payments that were looked up and not found"] = len(self.deployment.effects.not_found)
        mine["values sent"] = sum(map(len, people.sent.values()))
        mine["messages to runs"] = len(people.steered)
        mine += Counter(f"on_busy: {run.plan.on_busy}" for run in self.load.accepted)
        return dict(sorted(mine.items()))

    def _settle(self) -> None:
        """Wait until all runs have ended, at most `SETTLE_S`."""
        self.load.ask_again()
        began = time.monotonic()
        while (open_runs := self.load.open_runs()) and time.monotonic() - began < SETTLE_S:
            time.sleep(0.3)
        self._settled_s, self._stuck = time.monotonic() - began, open_runs

    def _check_growth(self, found: Audit) -> None:
        before, deployment = self._before, self.deployment
        most = CONNECTIONS_OF_PRODUCERS + CONNECTIONS_OF_WORKER * self._options.workers
        with suppress(TimeoutError):
            deployment.wait_for(lambda: deployment.connections() <= most, "connections are closed", IDLE_S)
        after = self._after = Usage.of(deployment)
        if after.connections > most:
            clients = Counter((each["name"], each["cmd"]) for each in deployment.admin.client_list())
            found.growth.append(
                f"{after.connections} connections to Redis, {most} are expected at most: {clients}"
            )
        if after.worker_bytes > before.worker_bytes * MOST_GROWTH:
            found.growth.append(f"a worker has {after.worker_bytes} bytes, {before.worker_bytes} before")


def _name_of(decision: Decision) -> str:
    return "approve with other arguments" if decision.arguments is not None else decision.action


@contextmanager
def chaos_run(options: Options, folder: Path) -> Generator[ChaosRun]:
    """Start the deployment of these options in this folder. It ends with the `with` block."""
    with Deployment(
        folder,
        workers=options.workers,
        lease_s=options.lease_s,
        appendfsync=options.appendfsync,
        sentinel=options.sentinel,
    ) as deployment:
        yield ChaosRun(deployment, options)
