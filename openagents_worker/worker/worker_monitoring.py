"""Worker monitoring: the only place that says what a worker process reports to Prometheus and to probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

from openagents_worker.settings import Settings
from openagents_worker.store.cell import Cell
from openagents_worker.store.fleet import own_version
from openagents_worker.store.fleet_samples import FleetSamples
from openagents_worker.telemetry import signals
from openagents_worker.telemetry.series import Sample
from openagents_worker.worker.background import Health, HealthReport, Leave
from openagents_worker.worker.lease import WorkerLease
from openagents_worker.worker.monitoring import MonitoringReply, MonitoringServer, Route, checks_answer
from openagents_worker.worker.watchdog import LoopWatchdog

if TYPE_CHECKING:
    from openagents_worker.telemetry.prometheus import PrometheusMeter

__all__ = ["ObservedWorker", "WorkerMonitoring"]

Check = tuple[str, str]
"""The name of a check, and its problem or ''."""


class ObservedRunner(Protocol):
    accepting: bool

    def known(self) -> frozenset[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedWorker:
    """What the monitoring reads of its worker process, in its own threads.

    `is_consuming`: whether the process gets messages from the broker. `parts` returns the health of the
    background parts by name, `tools` the counts of `Offload.stats`.
    """

    runner: ObservedRunner
    watchdog: LoopWatchdog
    lease: Callable[[], WorkerLease]
    is_consuming: Callable[[], bool]
    parts: Callable[[], Mapping[str, HealthReport]]
    tools: Callable[[], Mapping[str, Any]]
    max_runs: int | None = None

    def liveness(self, loop_dead_s: float) -> Iterator[Check]:
        """The checks of `/livez`: a process that fails them must be restarted.

        They do not depend on Redis or on the broker: a restart would not help.
        """
        silent_s = self.watchdog.silent_s()
        is_dead = silent_s >= loop_dead_s
        yield "event loop", f"no answer for {silent_s:.1f} s" if is_dead else ""
        late_s = self.watchdog.health.report().late_s
        yield "watchdog", "" if late_s is None else f"no round for {late_s:.0f} s"

    def readiness(self, loop_dead_s: float) -> Iterator[Check]:
        """The checks of `/readyz`: a process that fails them takes no new runs now."""
        yield from self.liveness(loop_dead_s)
        yield "lease", "" if self.lease().remaining_s() > 0 else "none: Redis has not confirmed it in time"
        yield "consumer", "" if self.is_consuming() else "not connected to the broker"
        yield "accepts runs", "" if self.runner.accepting else "the worker hands its runs over and stops"

    def samples(self, loop_dead_s: float) -> Iterator[Sample]:
        """The series of this process that are read when it is scraped."""
        yield Sample("openagents_worker_info", 1, (own_version(),))
        yield Sample("openagents_runs_in_progress", len(self.runner.known()))
        if self.max_runs is not None:
            yield Sample("openagents_run_slots", self.max_runs)
        yield Sample("openagents_lease_remaining_seconds", self.lease().remaining_s())
        yield Sample("openagents_loop_lag_seconds", self.watchdog.lag_s())
        yield Sample("openagents_loop_blocks", self.watchdog.stats()["blocks"])
        threads = self.tools()["threads"]
        for state, name in (("limit", "limit"), ("started", "threads"), ("busy", "busy")):
            yield Sample("openagents_tool_threads", threads[name], (state,))
        yield Sample("openagents_tool_threads_waiting", threads["waiting"])
        for name, report in self.parts().items():
            yield Sample("openagents_part_failing", report.is_failing or report.late_s is not None, (name,))
        is_ready = not any(problem for _, problem in self.readiness(loop_dead_s))
        yield Sample("openagents_ready", is_ready)


class WorkerMonitoring:
    """Serves metrics and probes at the ports of the settings. A background part of a worker process.

    It begins before the other parts and ends after them, so that probes are answered during both.
    """

    name = "monitoring"

    def __init__(self, settings: Settings, cell: Cell, observed: ObservedWorker, *, leave: Leave) -> None:
        self.health = Health()
        self._settings = settings
        self._observed = observed
        self._meter: PrometheusMeter | None = None
        self._fleet: FleetSamples | None = None
        routes: dict[int, dict[str, Route]] = {}
        if settings.metrics_port is not None:
            routes.setdefault(settings.metrics_port, {})["/metrics"] = self._metrics_route(cell)
        if settings.health_port is not None:
            routes.setdefault(settings.health_port, {}).update(self._probes())
        self._servers = [
            MonitoringServer(settings.monitoring_address, port, paths, health=self.health, leave=leave)
            for port, paths in routes.items()
        ]

    def _metrics_route(self, cell: Cell) -> Route:
        # Here, so that a worker without metrics neither needs nor loads the library.
        from openagents_worker.telemetry.prometheus import (
            PrometheusMeter,
            SampleCollector,
            metrics_text,
            new_registry,
        )

        self._meter = PrometheusMeter()
        self._fleet = FleetSamples(cell, self._settings.queue)
        own = SampleCollector(lambda: self._observed.samples(self._settings.loop_dead_s))
        registry = new_registry(self._meter, own, SampleCollector(self._fleet), process=True)
        return lambda accept: MonitoringReply(HTTPStatus.OK, *metrics_text(registry, accept))

    def _probes(self) -> dict[str, Route]:
        limit_s = self._settings.loop_dead_s
        return {
            "/livez": lambda _: checks_answer(self._observed.liveness(limit_s)),
            "/readyz": lambda _: checks_answer(self._observed.readiness(limit_s)),
        }

    def start(self) -> None:
        if self._meter is not None:
            signals.register_meter(self._meter)
        for server in self._servers:
            server.start()

    def stop(self) -> None:
        for server in self._servers:
            server.stop()
        if self._meter is not None:
            signals.unregister_meter(self._meter)
        if self._fleet is not None:
            self._fleet.close()
