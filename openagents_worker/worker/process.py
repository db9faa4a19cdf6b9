"""The worker process: the only place that joins the loop, the runner and the background parts."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from openagents_worker.concurrency import end_task
from openagents_worker.errors import RedisUnreachable
from openagents_worker.producer.client import cell_of
from openagents_worker.runtime.assembly import Assembly
from openagents_worker.runtime.attempt import EX_DOES_NOT_STOP
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.marks import Marks
from openagents_worker.runtime.runner import AttemptResult, Runner
from openagents_worker.settings import Settings
from openagents_worker.store.client import AsyncStore
from openagents_worker.store.fleet import WorkerCard, own_version
from openagents_worker.store.scripts import Wake
from openagents_worker.telemetry.logs import get_logger, line_groups
from openagents_worker.worker.accusing import accuse_run
from openagents_worker.worker.background import Leave, background_task
from openagents_worker.worker.backlog import Backlog
from openagents_worker.worker.completion_acks import CompletionAcks
from openagents_worker.worker.control_channel import ControlChannel
from openagents_worker.worker.drain import drain, stop_runs
from openagents_worker.worker.heartbeat import Heartbeat
from openagents_worker.worker.local_processes import LocalProcessWatch, ProcessIdentity, this_process
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.rescue import Rescue
from openagents_worker.worker.stall_monitor import StallMonitor
from openagents_worker.worker.watchdog import LoopWatchdog

__all__ = ["SendWakes", "WorkerProcess"]

log = get_logger(__name__)

T = TypeVar("T")
SendWakes = Callable[[Sequence[Wake]], object]


class WorkerProcess:
    """Executes runs in one operating-system process, from its first lease to its last.

    Create and start it in the process that uses it, never before a fork.
    """

    def __init__(
        self,
        settings: Settings,
        assembly: Assembly,
        *,
        node: str,
        queues: Sequence[str],
        send_wakes: SendWakes,
        max_runs: int | None = None,
        loop_thread: LoopThread | None = None,
        leave: Leave = os._exit,
    ) -> None:
        """`max_runs` is the pool's limit of concurrent runs, for listings; None if it is unknown.
        `loop_thread` is the loop to use; without it the process starts its own.

        `leave` ends the process with an exit code when a part of it has failed or a run cannot be stopped.
        """
        self.settings = settings
        self._limits = settings.time_limits
        self._assembly = assembly
        self._publish = send_wakes
        self._leave = leave
        self._owns_process = leave is os._exit
        """Whether the worker may end the process: not if the caller has given its own `leave`."""
        # Publishing is synchronous and may wait for the broker; it must not block the loop.
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="openagents-publisher")
        self._loop_thread = loop_thread or LoopThread()
        self._owns_loop = loop_thread is None
        if self._owns_loop:
            self._loop_thread.start()
        self._loop_thread.run(self._build(node, queues, max_runs))

    async def _build(self, node: str, queues: Sequence[str], max_runs: int | None) -> None:
        """Create the parts, on the loop."""
        settings, limits, loop = self.settings, self._limits, asyncio.get_running_loop()
        cell = cell_of(settings)
        self.store = AsyncStore(cell, answer_timeout_s=limits.run_answer_s)
        self._marks = Marks(is_shared=self._owns_process)
        self.runner = Runner(
            store=self.store,
            lease=lambda: self.heartbeat.lease,
            assembly=self._assembly,
            settings=settings,
            send_wakes=self.send_wakes,
            leave=self._leave,
            marks=self._marks,
        )
        self._control_channel = ControlChannel(
            cell,
            on_cancel=lambda run: self.runner.latch(run, LatchReason.CANCELLED),
            leave=self._leave,
        )
        check_every_s = settings.alive_look_ms / 1000
        own = this_process() if settings.watch_processes and check_every_s else None
        self._local_processes = (
            LocalProcessWatch(
                own, on_dead=self._report_dead, check_every_s=check_every_s / 2, leave=self._leave
            )
            if own is not None
            else None
        )
        self.heartbeat = Heartbeat(
            cell=cell,
            node=node,
            limits=limits,
            announcements=self._assembly.announcements(),
            run_host=self.runner,
            loop=loop,
            send_wakes=self.send_wakes,
            on_registered=self._control_channel.follow,
            check_every_s=check_every_s * 2,
            process=own,
            on_local_workers=self._watch_local_workers,
            on_given_up=lambda: self.rescue.check_leases_now(),
            max_recoveries=settings.max_recoveries,
            card=WorkerCard(
                host=socket.gethostname(),
                pid=os.getpid(),
                version=own_version(),
                queues=tuple(queues),
                agents=dict(self._assembly.hashes),
                max_runs=max_runs,
            ),
            loop_lag_ms=lambda: self._watchdog.take_lag_ms(),
            on_lease=lambda lease: self._stall_monitor.lease_begins(lease),
            leave=self._leave,
        )
        self._watchdog = LoopWatchdog(
            loop=loop,
            loop_thread_id=lambda: self._loop_thread.thread_id,
            lease=lambda: self.heartbeat.lease,
            run_host=self.runner,
            tick_s=limits.watch_tick_s,
            dead_after_s=limits.loop_dead_s,
            accuse=lambda run_id: accuse_run(
                cell,
                within_s=limits.accuse_s,
                run_id=run_id,
                incarnation=self.heartbeat.lease.incarnation,
            ),
            executing=self._marks.executing_on_loop,
            busy_tool_threads=lambda: self._assembly.offload.stats()["threads"]["busy"],
            leave=self._leave,
            loop_waited_s=self._loop_thread.waited_s,
            is_busy=lambda: self._loop_thread.is_busy(),
            work_began=self._loop_thread.work_began,
            on_work_began=lambda: self._stall_monitor.work_begins(),
        )
        self._stall_monitor = StallMonitor(
            self._marks,
            cell=cell,
            limits=limits,
            loop_thread_ids=lambda: (
                self._loop_thread.native_thread_id or 0,
                self._loop_thread.thread_id or 0,
            ),
            is_busy=lambda: self._loop_thread.is_busy(),
            leave=self._leave,
        )
        self._completion_acks = CompletionAcks(self.store, leave=self._leave)
        self._backlog = Backlog(settings.broker_url)
        self.rescue = Rescue(
            store=self.store,
            backlog=self._backlog,
            send_wakes=self.send_wakes,
            queues=queues,
            lease_ms=settings.lease_ms,
            heartbeat_ms=settings.heartbeat_ms,
            max_recoveries=settings.max_recoveries,
        )

    def start(self) -> None:
        """Start the background parts; returns before Redis has answered."""
        _tune_garbage_collector()
        if self._owns_process:
            self._stall_monitor.start()
        if self._local_processes is not None:
            self._local_processes.start()
        self.heartbeat.start()
        self._watchdog.start()
        self._loop_thread.run(self._start_rescue())

    def _watch_local_workers(self, workers: Mapping[str, str]) -> None:
        if self._local_processes is not None:
            self._local_processes.watch(workers)

    def _report_dead(self, dead: Mapping[str, ProcessIdentity]) -> None:
        self._loop_thread.call_soon(self.rescue.note_dead, dead)

    async def _start_rescue(self) -> None:
        self._rescue_task = background_task(self.rescue.run(), name="rescue", leave=self._leave)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop of the process, from a task body, and wait for its result."""
        return self._loop_thread.run(work)

    def execute(self, run_id: str, format_: int) -> AttemptResult:
        """Execute a run, from a task body. A soft time limit ends the run."""
        execution = self.runner.execute(run_id, format_)
        if (body := self._loop_thread.current_body()) is not None:  # a soft limit is raised in the runner
            return body.wait(execution)

        def stop(limit: Exception) -> None:
            self._loop_thread.call_soon(self.runner.interrupt, run_id, limit)

        return self._loop_thread.run(execution, interrupted=stop)

    def stats(self) -> dict[str, Any]:
        """Figures for operators: the incarnation, the runs, blocks of the loop, and threads of tools."""
        return {
            "incarnation": self.heartbeat.lease.incarnation,
            "runs": len(self.runner.known()),
            "loop": self._watchdog.stats(),
            "tools": self._assembly.offload.stats(),
        }

    def completion_notified(self, run_id: str, life: int, *, wait: bool) -> None:
        """Record that Celery was notified of the end of this life of the run; `wait` until it is written."""
        self._loop_thread.call_soon(self._completion_acks.add, run_id, life)
        if wait:
            self._loop_thread.run(self._completion_acks.aclose())

    async def send_wakes(self, wakes: Sequence[Wake]) -> None:
        """Publish wake-ups. If the broker fails, this logs a warning and the rescue loop re-sends them.

        Waits at most `publish_patience_s`: the wake-ups follow in the background if the broker is slow.
        """
        if not wakes:
            return
        publishing = asyncio.get_running_loop().run_in_executor(self._publisher, self._publish_or_log, wakes)
        await asyncio.wait([publishing], timeout=self._limits.publish_patience_s)

    def _publish_or_log(self, wakes: Sequence[Wake]) -> None:
        try:
            self._publish(wakes)
        except Exception as error:  # noqa: BLE001 - each broker library has its own errors
            log.warning("wakes.not_sent", runs=len(wakes), error=type(error).__name__)

    def hand_over(self) -> None:
        """Begin to hand the runs over; returns at once. May be called in a signal handler."""

        def begin() -> None:
            self._hand_over_task = background_task(self._hand_over(), name="hand over", leave=self._leave)

        self._loop_thread.loop.call_soon_threadsafe(begin)

    async def _hand_over(self) -> None:
        """Drain; end the process if runs cannot be stopped."""
        if not await drain(self.runner, self._limits) and not await stop_runs(self.runner, self._limits):
            self._exit_with_runs_left()

    def _exit_with_runs_left(self) -> None:
        """End the process before its lease: no worker may take the runs while their code still executes
        here."""
        for line in self.runner.code_in_progress():
            log.error("run.does_not_stop", reason="the worker stops", exit_code=EX_DOES_NOT_STOP, **line)
        line_groups.flush()
        self._leave(EX_DOES_NOT_STOP)

    def close(self) -> None:
        """Hand the runs over, end the lease and close all parts, within a little more than
        `DRAIN_TIMEOUT_S`."""
        if not self._loop_thread.run(drain(self.runner, self._limits)) and not self._loop_thread.run(
            stop_runs(self.runner, self._limits)
        ):
            self._exit_with_runs_left()
        self._stall_monitor.stop()
        self._watchdog.stop()
        if self._local_processes is not None:
            self._local_processes.stop()
        runs_left = self.heartbeat.retire() == "OVER"
        self._loop_thread.run(self._close(reclaim=runs_left))
        self._publisher.shutdown()
        if self._owns_loop:
            self._loop_thread.stop()
        log.info("worker.stopped", incarnation=self.heartbeat.lease.incarnation)
        line_groups.flush()

    async def _close(self, *, reclaim: bool) -> None:
        """Close the parts, on the loop."""
        await end_task(self._rescue_task)
        if reclaim:
            try:
                # Our own runs: other workers would reclaim them only after the planned expiry of our lease.
                await self.rescue.reclaim_all()
            except RedisUnreachable as error:
                log.warning("worker.runs_left", error=error.message)
        await self._completion_acks.aclose()
        await self._control_channel.aclose()
        await self._backlog.aclose()
        await self._assembly.aclose()
        await self.store.close()


def _tune_garbage_collector() -> None:
    """Exclude all loaded objects from garbage collection, and collect less often.

    Without this a full collection every few hundred runs would block the loop (180 ms were measured).
    Python's default threshold starts a collection every 700 objects; one run creates more. With a thousand
    waiting runs, collections took a fifth of the processor time.
    """
    gc.collect()
    gc.freeze()
    if gc.get_threshold() == PYTHONS_GC_THRESHOLD:  # the default: no other code has set it
        gc.set_threshold(*GC_THRESHOLD)


PYTHONS_GC_THRESHOLD = (700, 10, 10)
GC_THRESHOLD = (50_000, 10, 10)
