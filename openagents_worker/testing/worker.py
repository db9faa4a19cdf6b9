"""A worker inside the test's process: the only place that executes runs without Celery.

It uses the runtime of a real worker process, on an event loop in a thread, with a real Redis: the same
scripts, journal, retries, cancellation, events and results. Celery is missing: waiting runs are read from
Redis instead of messages. So there are no Celery callbacks, and Flower does not show the runs. Killed
processes, lost messages and draining cannot be tested here; use real worker processes for them.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from openagents_worker.agents import AgentDefinition, AppConfig, load_agents
from openagents_worker.errors import RedisUnreachable
from openagents_worker.llm.base import LLMClient
from openagents_worker.models import RunResult
from openagents_worker.producer.client import Client, cell_of
from openagents_worker.producer.handle import RunHandle
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.plugins import load_plugins
from openagents_worker.runtime.runner import AttemptOutcome, Runner
from openagents_worker.settings import Settings
from openagents_worker.store import scripts
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.fleet import WorkerCard, own_version
from openagents_worker.store.scripts import Wake
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.testing.scripted_model import ScriptedModel
from openagents_worker.time_limits import TimeLimits

__all__ = ["Agents", "AgentsWorker"]

log = get_logger(__name__)

POLL_S = 0.01  # between two queries for waiting runs
HEARTBEAT_S = 0.05  # between two heartbeats, which find cancellations and due retries
REDIS_RETRY_S = 0.1  # before the next query if Redis does not answer
BATCH_SIZE = 100  # runs per query
RUN_TIMEOUT_S = 30.0

Agents = Sequence[Mapping[str, Any]] | Path | str
"""Agent definitions as in the agents file, or the path of an agents file."""


class AgentsWorker:
    """A running worker, for use in a test. `client` is a producer for it."""

    def __init__(self, config: AppConfig, settings: Settings, model: ScriptedModel | None) -> None:
        self.client = Client(settings=settings)
        self._config = config
        self._settings = settings
        self._model = model

    def submit(
        self, agent_id: str, input_text: str, *, session_id: str | None = None, **fields: Any
    ) -> RunHandle[Any]:
        """Submit a run. The default session is a new one. `fields`: other fields of `RunRequest`."""
        session_id = session_id or f"session-{uuid.uuid4().hex[:8]}"
        return self.client.submit(
            {"agent_id": agent_id, "session_id": session_id, "input_text": input_text, **fields}
        )

    def run(
        self, agent_id: str, input_text: str, *, timeout: float = RUN_TIMEOUT_S, **fields: Any
    ) -> RunResult[Any]:
        """Submit a run and wait until it ends, at most `timeout` seconds."""
        return self.submit(agent_id, input_text, **fields).wait(timeout)

    @contextmanager
    def running(self) -> Iterator[AgentsWorker]:
        """Execute runs while the block runs. Runs that have not ended then are abandoned."""
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        thread = threading.Thread(target=self._thread_main, args=(started,), name="agents-worker")
        thread.start()
        try:
            loop, stopping = started.result()
            try:
                with self.client:
                    yield self
            finally:
                loop.call_soon_threadsafe(stopping.set)
        finally:
            thread.join()

    def _thread_main(self, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        try:
            asyncio.run(self._serve(started))
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _serve(self, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        stopping, store = asyncio.Event(), AsyncStore(cell_of(self._settings))
        assembly = _TestAssembly(self._config, self._model)
        try:
            run_host = _TestRunHost(store, assembly, self._settings)
            await run_host.register()
            started.set_result((asyncio.get_running_loop(), stopping))
            await run_host.execute_until(stopping)
        finally:
            await assembly.aclose()
            await store.close()


class _TestAssembly(Assembly):
    """The agents of a test, with its scripted model where there is one."""

    def __init__(self, config: AppConfig, model: ScriptedModel | None) -> None:
        super().__init__(config, env=os.environ)
        self._scripted = model
        for agent in config.agents:
            self.parts(agent.id).new_pattern()  # so that an invalid agent fails before the first run

    def model(self, definition: AgentDefinition) -> LLMClient:
        if self._scripted is None:
            return super().model(definition)
        return self._scripted.client(definition)


class _TestLease:
    """The lease of this process. It is renewed from the event loop that executes the runs."""

    def __init__(self, limits: TimeLimits) -> None:
        self.incarnation = f"test@{os.getpid()}:{secrets.token_hex(6)}"
        self._lease_s = limits.local_lease_s
        self.renew(time.monotonic())

    def renew(self, sent_s: float) -> None:
        self._ends_s = sent_s + self._lease_s

    def remaining_s(self) -> float:
        return self._ends_s - time.monotonic()


class _TestRunHost:
    """Executes waiting runs, each in a task of its own, and sends heartbeats."""

    def __init__(self, store: AsyncStore, assembly: Assembly, settings: Settings) -> None:
        self._store = store
        self._limits = settings.time_limits
        self._lease = _TestLease(self._limits)
        self._lease_ms = settings.lease_ms
        self._announcements = assembly.announcements()
        self._queues = {settings.queue, *(agent.queue for agent in assembly.config.agents if agent.queue)}
        self._card = WorkerCard(
            host=socket.gethostname(),
            pid=os.getpid(),
            queues=tuple(sorted(self._queues)),
            agents=dict(assembly.hashes),
            max_runs=None,
            version=own_version(),
        )
        self._tasks: dict[str, asyncio.Task[object]] = {}
        self._runner = Runner(
            store=store,
            lease=lambda: self._lease,
            assembly=assembly,
            settings=settings,
            send_wakes=self._ignore_wakes,
            leave=lambda _: None,  # never end the process: it runs the tests
        )

    async def register(self, previous: str = "") -> None:
        """Register this worker and its agents in Redis, where producers look them up."""
        incarnation, lease_ms = self._lease.incarnation, self._lease_ms
        await self._store.run(
            scripts.register(
                incarnation=incarnation,
                lease_ms=lease_ms,
                agents=self._announcements,
                previous=previous,
                info=self._card.to_json(),
            )
        )

    async def execute_until(self, stopping: asyncio.Event) -> None:
        """Execute runs until the event is set; then stop those that still run."""
        next_heartbeat_s = 0.0
        while not stopping.is_set():
            pause_s = POLL_S
            try:
                if time.monotonic() >= next_heartbeat_s:
                    await self._heartbeat()
                    next_heartbeat_s = time.monotonic() + HEARTBEAT_S
                await self._start_waiting_runs()
            except RedisUnreachable as error:
                log.warning("worker.redis_away", error=error.message)
                pause_s = REDIS_RETRY_S
            try:
                async with asyncio.timeout(pause_s):
                    await stopping.wait()
            except TimeoutError:
                continue
        await self._stop_runs()

    async def _heartbeat(self) -> None:
        """Renew the lease, apply cancellations, and wake due runs. Register again after a lost lease."""
        sent_s = time.monotonic()
        renewal = await self._store.run(
            scripts.renew(incarnation=self._lease.incarnation, lease_ms=self._lease_ms)
        )
        if renewal.lost:  # Redis was flushed, or the process was stopped for longer than its lease
            await self._runner.latch_all(LatchReason.FENCED, "the lease is over")
            previous, self._lease = self._lease.incarnation, _TestLease(self._limits)
            await self.register(previous)
            return
        self._lease.renew(sent_s)
        for run_id in renewal.cancel_requested:
            self._runner.latch(run_id, LatchReason.CANCELLED)
        await self._store.run(scripts.wake(limit=BATCH_SIZE))
        await self._store.run(scripts.reclaim(limit=BATCH_SIZE, max_recoveries=BATCH_SIZE, blameless=True))

    async def _start_waiting_runs(self) -> None:
        """Start a task for each run that waits in one of the queues."""
        for queue in self._queues:
            key = self._store.keys("sent", queue)
            waiting: list[str] = await self._store.ask(lambda r, key=key: r.zrange(key, 0, BATCH_SIZE))  # type: ignore[misc]
            for run_id in waiting:
                if run_id not in self._tasks:
                    task = asyncio.create_task(self._execute(run_id), name=f"execute {run_id}")
                    self._tasks[run_id] = task
                    task.add_done_callback(lambda _, run_id=run_id: self._tasks.pop(run_id))  # type: ignore[misc]

    async def _execute(self, run_id: str) -> None:
        attempt_result = await self._runner.execute(run_id)
        if attempt_result.kind is AttemptOutcome.FINISHED:  # there is no Celery to notify
            with suppress(RedisUnreachable):
                await self._store.run(scripts.confirm_completion(runs=[run_id, str(attempt_result.life)]))

    async def _ignore_wakes(self, wakes: Sequence[Wake]) -> None:
        """Send no wake-up messages: this worker finds woken runs in Redis."""

    async def _stop_runs(self) -> None:
        self._runner.accepting = False
        await self._runner.latch_all(LatchReason.FENCED, "the test has ended")
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))
        await self._store.run(scripts.retire(incarnation=self._lease.incarnation))


def config_of(agents: Agents | None, settings: Settings) -> AppConfig:
    """Load the agents of a test: definitions, which are completed with defaults, or an agents file.

    Raises the errors of `load_agents`.
    """
    load_plugins(settings.imports)
    if agents is None:
        return load_agents(settings.config)
    if isinstance(agents, Path | str):
        return load_agents(agents)
    return load_agents(json.dumps({"agents": [_with_defaults(agent) for agent in agents]}))


def _with_defaults(agent: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        "name": agent.get("id", ""),
        "memory": {"type": "buffer"},
        "pattern": {"type": "react"},
        "llm": {"provider": "scripted", "script": []},
    }
    return {**defaults, **agent}
