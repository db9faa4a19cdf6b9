"""The only place that makes the worker process of an operating-system process, and that ends it."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from typing import Any

from celery import Task

from openagents_worker.agents import AppConfig
from openagents_worker.celery.flower_repair import FlowerRepair
from openagents_worker.runtime.assembly import Assembly, UnavailableAgent
from openagents_worker.settings import Settings
from openagents_worker.worker.background import Leave
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.process import SendWakes, WorkerProcess

__all__ = ["CeleryProcess", "ProcessHolder"]


class CeleryProcess(WorkerProcess):
    """A worker process whose runs Celery shows, too."""

    async def _build(self, node: str, queues: Sequence[str], max_runs: int | None) -> None:
        await super()._build(node, queues, max_runs)
        self._rows = FlowerRepair(self.store, leave=self._leave)

    def put_aside(self, task: Task, run_id: str) -> None:
        """Celery is about to be told that the run is retried: see to it that its row shows how it ends."""
        self._bridge.soon(self._rows.put_aside, task.app, task.request.hostname, run_id)

    async def _close(self, *, reclaim: bool) -> None:
        await self._rows.aclose()
        await super()._close(reclaim=reclaim)


class ProcessHolder:
    """Holds the one `CeleryProcess` of each operating-system process in which an app's tasks run."""

    def __init__(self, settings: Settings, send_wakes: SendWakes, *, leave: Leave = os._exit) -> None:
        self.settings = settings
        self._leave = leave
        self.node = socket.gethostname()
        self.queues: tuple[str, ...] = (settings.queue,)
        self.max_runs: int | None = None
        """How many runs at once the worker's pool gives to one process; None: nobody knows."""
        self.bridge: LoopThread | None = None
        """The loop of a pool that has one; set before the first use."""
        self._send_wakes = send_wakes
        self.config: AppConfig | None = None
        """The agents file, once it has been read: those of its agents that can be served here."""
        self.unavailable: tuple[UnavailableAgent, ...] = ()
        """The agents of the file that cannot be served here."""
        self._assembly: Assembly | None = None
        self._process: CeleryProcess | None = None
        self._pid = 0
        self._closed = False
        self._lock = threading.Lock()

    def check(self) -> None:
        """Import the plugins and read the agents file. Raises a coded error that says what is wrong."""
        if self._assembly is None:
            self._assembly = Assembly.from_settings(self.settings)
            self.config = self._assembly.config
            self.unavailable = tuple(self._assembly.unavailable.values())

    def process(self) -> CeleryProcess | None:
        """The process's own, made and started on first use; None once the worker is stopping."""
        with self._lock:
            if self._closed:
                return None
            if self._process is None or self._pid != os.getpid():  # a forked child makes one of its own
                self.check()
                assert self._assembly is not None
                self._process = CeleryProcess(
                    self.settings,
                    self._assembly,
                    node=self.node,
                    queues=self.queues,
                    max_runs=self.max_runs,
                    send_wakes=self._send_wakes,
                    bridge=self.bridge,
                    leave=self._leave,
                )
                self._process.start()
                self._pid, self._assembly = os.getpid(), None
            return self._process

    def is_registered(self) -> bool:
        """Whether runs may be claimed here. Where child processes do the work, each knows it for itself."""
        process = self._process
        return process is None or process.heartbeat.lease.remaining_s() > 0

    def hand_over(self) -> None:
        """Begin to hand the process's runs over. Takes no lock: the thread it interrupts may hold it."""
        process = self._process
        if process is not None:
            process.hand_over()

    def stats(self) -> dict[str, Any]:
        """The process's own; empty before its start, after its end, and where children do the work."""
        process = self._process
        return process.stats() if process is not None and self._pid == os.getpid() else {}

    def close(self) -> None:
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None and self._pid == os.getpid():
            process.close()
