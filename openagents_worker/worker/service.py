"""The service: the only place that starts and stops the background parts of a worker process, in order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

from openagents_worker.store.part_health import parts_json
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.background import BackgroundPart, Health, HealthReport
from openagents_worker.worker.loop_thread import LoopThread

__all__ = ["LoopPart", "Service"]

log = get_logger(__name__)


class Service:
    """The background parts of one process. They start in the given order and stop in the reverse order.

    A part may use the parts before it in the list until it is stopped.
    """

    def __init__(self, parts: Sequence[BackgroundPart]) -> None:
        self.parts = tuple(parts)
        self._not_stopped = list(self.parts)

    def start(self) -> None:
        """Start all parts. If one cannot be started, all are stopped and its error is raised."""
        try:
            for part in self.parts:
                part.start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all parts. A part that fails to stop is logged, and the others are stopped."""
        while self._not_stopped:
            part = self._not_stopped.pop()
            try:
                part.stop()
            except Exception:  # the other parts must be stopped too
                log.exception("part.not_stopped", part=part.name)

    def reports(self) -> dict[str, HealthReport]:
        """The health of each part, by the name of the part."""
        return {part.name: part.health.report() for part in self.parts}

    def health(self) -> dict[str, dict[str, Any]]:
        """The last good round and the last error of each part, by the name of the part."""
        return {
            name: {**asdict(report), "is_failing": report.is_failing}
            for name, report in self.reports().items()
        }

    def problems_json(self) -> str:
        """The parts that fail, are late, or have failed in the last minutes, for `renew`; '' if none."""
        found = (part.health.report().problem(part.name) for part in self.parts)
        return parts_json(problem for problem in found if problem is not None)


class LoopPart:
    """A background part whose work is done by coroutines on the loop of the process."""

    def __init__(
        self,
        name: str,
        loop_thread: LoopThread,
        *,
        health: Health,
        on_start: Callable[[], Awaitable[object]] | None = None,
        on_stop: Callable[[], Awaitable[object]],
    ) -> None:
        """`on_start` and `on_stop` are awaited on the loop; `on_start` returns when the part works."""
        self.name = name
        self.health = health
        self._loop_thread = loop_thread
        self._on_start = on_start
        self._on_stop = on_stop

    def start(self) -> None:
        if self._on_start is not None:
            self._loop_thread.run(_awaited(self._on_start))

    def stop(self) -> None:
        self._loop_thread.run(_awaited(self._on_stop))


async def _awaited(work: Callable[[], Awaitable[object]]) -> None:
    await work()
