"""The process holder: the only place that creates and closes the worker process of an OS process."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from celery import Task

from openagents_worker.agents import AppConfig
from openagents_worker.celery.flower_repair import FlowerRepair
from openagents_worker.runtime.assembly import Assembly, UnavailableAgent
from openagents_worker.settings import Settings
from openagents_worker.worker.background import BackgroundPart, Leave
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.process import SendWakes, WorkerProcess
from openagents_worker.worker.registration import WorkerIdentity
from openagents_worker.worker.service import LoopPart

__all__ = ["CeleryProcess", "ProcessHolder"]


class CeleryProcess(WorkerProcess):
    """A worker process whose runs Celery and Flower show."""

    def _background_parts(self) -> list[BackgroundPart]:
        self._flower_repair = FlowerRepair(self.store, leave=self._leave)
        part = LoopPart(
            "flower repair",
            self._loop_thread,
            health=self._flower_repair.health,
            on_stop=self._flower_repair.aclose,
        )
        return [part, *super()._background_parts()]

    def check_flower_later(self, task: Task, run_id: str) -> None:
        """Correct the run's state in Flower later, because Celery is about to send `task-retried`."""
        self._loop_thread.call_soon(self._flower_repair.check_later, task.app, task.request.hostname, run_id)


class ProcessHolder:
    """Holds the one `CeleryProcess` of each operating-system process in which an app's tasks run."""

    def __init__(self, settings: Settings, send_wakes: SendWakes, *, leave: Leave = os._exit) -> None:
        self.settings = settings
        self._leave = leave
        self.node = socket.gethostname()
        self.queues: tuple[str, ...] = (settings.queue,)
        """The queues of runs that this worker consumes."""
        self.run_queues: frozenset[str] | None = None
        """The queues of runs of the app, as far as they are known; None: every queue of the app."""
        self.max_runs: int | None = None
        """The number of runs that one process executes at a time; None if it is unknown."""
        self.loop_thread: LoopThread | None = None
        """The loop of the pool if it has one; set before the first use."""
        self.is_consuming: Callable[[], bool] = lambda: True
        """Whether the consumer of this Celery worker is connected; set before the first use."""
        self._send_wakes = send_wakes
        self.config: AppConfig | None = None
        """The agents file after `check()`, with the agents that this worker serves."""
        self.unavailable: tuple[UnavailableAgent, ...] = ()
        """The agents of the file that this worker cannot serve."""
        self._assembly: Assembly | None = None
        self._process: CeleryProcess | None = None
        self._pid = 0
        self._closed = False
        self._lock = threading.Lock()

    def check(self) -> None:
        """Import the plugins and read the agents file. Raises an `OpenAgentsError` for an invalid file."""
        if self._assembly is None:
            self._assembly = Assembly.from_settings(self.settings)
            self.config = self._assembly.config
            self.unavailable = tuple(self._assembly.unavailable.values())

    def process(self) -> CeleryProcess | None:
        """The worker process of this OS process, started at the first call; None if the worker is
        stopping."""
        with self._lock:
            if self._closed:
                return None
            if self._process is None or self._pid != os.getpid():  # a forked child creates its own
                self.check()
                assert self._assembly is not None
                self._process = CeleryProcess(
                    self.settings,
                    self._assembly,
                    WorkerIdentity(node=self.node, queues=self.queues, max_runs=self.max_runs),
                    send_wakes=self._send_wakes,
                    loop_thread=self.loop_thread,
                    leave=self._leave,
                )
                self._process.is_consuming = self.is_consuming
                self._process.start()
                self._pid, self._assembly = os.getpid(), None
            return self._process

    def is_registered(self) -> bool:
        """Whether this process may claim runs. True in the parent of child processes, which have own
        leases."""
        process = self._process
        return process is None or process.heartbeat.lease.remaining_s() > 0

    def hand_over(self) -> None:
        """Begin to hand over the runs. Takes no lock: it may interrupt the thread that holds the lock."""
        process = self._process
        if process is not None:
            process.hand_over()

    def stats(self) -> dict[str, Any]:
        """The figures of the process; empty before its start, after its end, and in a parent of children."""
        process = self._process
        return process.stats() if process is not None and self._pid == os.getpid() else {}

    def close(self) -> None:
        """Close the process of this OS process, and allow no new one."""
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process is not None and self._pid == os.getpid():
            process.close()
