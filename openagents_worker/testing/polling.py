"""Polling: the only place that executes runs which it finds in Redis instead of messages.

It takes the place of Celery's consumer in a worker process inside a test's process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from typing import Any

from openagents_worker.concurrency import end_task
from openagents_worker.errors import RedisUnreachable
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.runner import AttemptOutcome
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.scripts import Wake
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.worker.background import BackgroundPart, Health, background_task
from openagents_worker.worker.interruptions import end_overdue
from openagents_worker.worker.process import WorkerProcess
from openagents_worker.worker.registration import WorkerIdentity
from openagents_worker.worker.service import LoopPart

__all__ = ["PollingProcess"]

log = get_logger(__name__)

POLL_S = 0.01  # between two queries for waiting runs
WAKE_S = 0.05  # between two queries for due runs: soon, because tests wait for retries
REDIS_RETRY_S = 0.1  # before the next query if Redis does not answer
REGISTRATION_S = 30.0  # longer than any registration takes
RUNS_END_S = 1.0  # for the tasks of drained runs to record that their run has ended
BATCH_SIZE = 100  # runs per query


class PollingProcess(WorkerProcess):
    """A worker process that consumes no messages and does not end the operating-system process."""

    def __init__(self, settings: Settings, assembly: Assembly, *, node: str) -> None:
        queues = {settings.queue, *(agent.queue for agent in assembly.config.agents if agent.queue)}
        super().__init__(
            # A test does not wait for runs that have not ended.
            settings.model_copy(update={"drain_timeout_s": 0.0}),
            assembly,
            WorkerIdentity(node=node, queues=sorted(queues)),
            send_wakes=_send_nothing,
            leave=lambda _: None,  # it would end the tests
        )

    def start_and_wait(self) -> None:
        """Start, and return when the worker is registered. Raises `RedisUnreachable`."""
        self.run(self.store.ask(lambda r: r.ping()))
        self.start()
        if not self.heartbeat.wait_registered(REGISTRATION_S):
            raise RedisUnreachable("the worker could not register")
        self.run(self._control_channel.wait_until_listening())

    async def confirm_completion(self, run_id: str, life: int) -> None:
        """Record the end of this life of the run as notified; returns when it is written."""
        self._completion_acks.add(run_id, life)
        await self._completion_acks.aclose()

    def _background_parts(self) -> list[BackgroundPart]:
        poller = _Poller(self, self.identity.queues)
        part = LoopPart(
            "run poller",
            self._loop_thread,
            health=poller.health,
            on_start=poller.begin,
            on_stop=poller.aclose,
        )
        return [*super()._background_parts(), part]


class _Poller:
    """Starts a task for each waiting run of some queues, and wakes due runs."""

    def __init__(self, process: PollingProcess, queues: Collection[str]) -> None:
        self.health = Health()
        self._process = process
        self._store = process.store
        self._queues = queues
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._polling: asyncio.Task[Any] | None = None
        self._wake_at_s = 0.0

    async def begin(self) -> None:
        self._polling = background_task(self._poll(), name="run poller", leave=lambda _: None)

    async def aclose(self) -> None:
        """End. The drain has stopped the runs before; a task that still executes code is cancelled."""
        if self._polling is not None:
            await end_task(self._polling)
        if self._runs:
            await asyncio.wait(self._runs.values(), timeout=RUNS_END_S)
        for task in list(self._runs.values()):
            await end_task(task)

    async def _poll(self) -> None:
        while True:
            pause_s = POLL_S
            try:
                await self._start_waiting_runs()
                self.health.succeeded()
            except RedisUnreachable as error:
                self.health.failed(error)
                log.warning("worker.redis_away", error=error.message)
                pause_s = REDIS_RETRY_S
            await asyncio.sleep(pause_s)

    async def _start_waiting_runs(self) -> None:
        """Wake due runs, then start a task for each run that waits in one of the queues."""
        if not self._process.runner.accepting:
            return
        if time.monotonic() >= self._wake_at_s:
            self._wake_at_s = time.monotonic() + WAKE_S
            woken = await self._store.run(scripts.wake(limit=BATCH_SIZE))
            for run_id in woken.overdue:
                await end_overdue(self._store, run_id)
        for queue in self._queues:
            key = self._store.keys("sent", queue)
            waiting: list[str] = await self._store.ask(lambda r, key=key: r.zrange(key, 0, BATCH_SIZE))  # type: ignore[misc]
            for run_id in waiting:
                if run_id not in self._runs:
                    task = asyncio.create_task(self._execute(run_id), name=f"execute {run_id}")
                    self._runs[run_id] = task
                    task.add_done_callback(lambda _, run_id=run_id: self._runs.pop(run_id))  # type: ignore[misc]

    async def _execute(self, run_id: str) -> None:
        attempt_result = await self._process.runner.execute(run_id)
        if attempt_result.kind is AttemptOutcome.FINISHED:  # there is no Celery to notify
            await self._process.confirm_completion(run_id, attempt_result.life)


def _send_nothing(wakes: Sequence[Wake]) -> None:
    """Send no wake-up messages: this worker finds woken runs in Redis."""
