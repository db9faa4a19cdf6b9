"""Fleet samples: the only place that turns the figures of the fleet into samples of metrics.

The figures are read at most once in some seconds. If Redis does not answer, the samples say so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from openagents_worker.errors import OpenAgentsError
from openagents_worker.store.cell import Cell
from openagents_worker.store.client import Store
from openagents_worker.store.figures import Figures, read_figures
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.telemetry.series import MAX_LABEL_VALUES, Sample

__all__ = ["FleetSamples"]

log = get_logger(__name__)

KEPT_S = (
    5.0  # Prometheus scrapes every 15 s or more; several Prometheus servers share what one of them has read
)
ANSWER_S = 2.0  # shorter than the time-out of a scrape, which is 10 s by default
LOG_AGAIN_S = 60.0


class FleetSamples:
    """Reads the figures of a fleet over a connection of its own. Thread-safe."""

    def __init__(
        self, cell: Cell, default_queue: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = Store(cell, max_connections=1, answer_timeout_s=ANSWER_S, connect_timeout_s=ANSWER_S)
        self._default_queue = default_queue
        self._clock = clock
        self._lock = threading.Lock()
        self._figures: Figures | None = None
        self._may_read_runs: bool | None = None  # not known yet
        self._read_at_s = -KEPT_S
        self._logged_at_s = -LOG_AGAIN_S

    def __call__(self) -> Iterator[Sample]:
        with self._lock:
            if self._clock() - self._read_at_s >= KEPT_S:
                self._figures = self._read()
                self._read_at_s = self._clock()
            figures = self._figures
        yield Sample("openagents_fleet_up", figures is not None)
        if figures is not None:
            yield from _samples(figures)

    def _read(self) -> Figures | None:
        try:
            plan = read_figures(self._store.keys, self._default_queue, self._may_read_runs)
            figures = self._store.execute(plan)
        except OpenAgentsError as error:
            if self._clock() - self._logged_at_s >= LOG_AGAIN_S:
                self._logged_at_s = self._clock()
                log.warning("metrics.fleet_not_read", code=error.code, error=error.message, hint=error.hint)
            return None
        self._may_read_runs = figures.may_read_runs
        return figures

    def close(self) -> None:
        self._store.close()


def _samples(figures: Figures) -> Iterator[Sample]:
    alive = [worker for worker in figures.workers if worker.is_alive]
    yield Sample("openagents_fleet_workers", len(alive), ("alive",))
    yield Sample("openagents_fleet_workers", len(figures.workers) - len(alive), ("dead",))
    yield Sample("openagents_fleet_run_slots", sum(worker.max_runs or 0 for worker in alive))
    lag_ms = max((worker.loop_lag_ms or 0 for worker in alive), default=0)
    yield Sample("openagents_fleet_loop_lag_seconds", lag_ms / 1000)
    for state, runs in (
        ("running", figures.running),
        ("queued", sum(queue.waiting for queue in figures.queues)),
        ("due_later", figures.due),
        ("awaiting_approval", figures.approvals),
        ("waiting_with_timeout", figures.timeouts),
        ("waiting_for_limit", sum(limit.waiting for limit in figures.limits)),
    ):
        yield Sample("openagents_fleet_runs", runs, (state,))
    for queue in figures.queues:
        labels = (queue.name,)
        yield Sample("openagents_queue_runs", queue.waiting, labels)
        yield Sample("openagents_queue_oldest_run_age_seconds", queue.oldest_age_ms / 1000, labels)
        yield Sample("openagents_queue_workers", queue.workers, labels)
        yield Sample("openagents_queue_messages_resent", queue.resent, labels)
    for limit in figures.limits[:MAX_LABEL_VALUES]:
        yield Sample("openagents_limit_runs_waiting", limit.waiting, (limit.name,))
    yield Sample("openagents_items_put_aside", figures.put_aside)
