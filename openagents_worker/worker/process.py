"""The worker process: the only place that joins the loop, the runner and the background parts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from openagents_worker.store.notice import CANCEL, FACT
from openagents_worker.store.scripts import Wake
from openagents_worker.telemetry.logs import get_logger, line_groups
from openagents_worker.worker.accusing import accuse_run
from openagents_worker.worker.background import BackgroundPart, Leave, ProcessControls, background_task
from openagents_worker.worker.backlog import Backlog
from openagents_worker.worker.completion_acks import CompletionAcks
from openagents_worker.worker.control_channel import ControlChannel
from openagents_worker.worker.drain import drain, stop_runs
from openagents_worker.worker.heartbeat import (
    Heartbeat,
    HeartbeatCallbacks,
    HeartbeatLimits,
)
from openagents_worker.worker.interpreter import tune_interpreter
from openagents_worker.worker.local_processes import LocalProcessWatch, ProcessIdentity, this_process
from openagents_worker.worker.loop_thread import LoopThread
from openagents_worker.worker.notice_handlers import NoticeHandler, NoticeHandlers, confirm_in_redis
from openagents_worker.worker.open_jobs import OpenJobs
from openagents_worker.worker.open_responses import OpenResponses
from openagents_worker.worker.outbox import Outbox, Recipient, Recipients
from openagents_worker.worker.registration import WorkerIdentity, registration_of
from openagents_worker.worker.rescue import Rescue, RescueLimits
from openagents_worker.worker.run_export import RunExport
from openagents_worker.worker.service import LoopPart, Service
from openagents_worker.worker.stall_monitor import StallMonitor
from openagents_worker.worker.watchdog import LoopWatchdog, WatchdogCallbacks, WatchdogLimits, WatchedLoop
from openagents_worker.worker.worker_tracing import WorkerTracing, wants_tracing

__all__ = ["SendWakes", "WorkerProcess"]

log = get_logger(__name__)

T = TypeVar("T")
SendWakes = Callable[[Sequence[Wake]], object]
NO_RECIPIENTS = Recipients()


class WorkerProcess:
    """Executes runs in one operating-system process, from its first lease to its last.

    Create and start it in the process that uses it, never before a fork.
    """

    def __init__(
        self,
        settings: Settings,
        assembly: Assembly,
        identity: WorkerIdentity,
        *,
        send_wakes: SendWakes,
        recipients: Recipients = NO_RECIPIENTS,
        loop_thread: LoopThread | None = None,
        leave: Leave = os._exit,
    ) -> None:
        """`loop_thread` is the loop to use; without it the process starts its own.

        `recipients` are notified of the end of every run, besides Celery.
        `leave` ends the process with an exit code when a part of it has failed or a run cannot be stopped.
        """
        self.settings = settings
        self.identity = identity
        self._limits = settings.time_limits
        self._assembly = assembly
        self._publish = send_wakes
        self._recipients = recipients
        self._leave = leave
        self.is_consuming: Callable[[], bool] = lambda: True
        """Whether the process gets messages from a broker now. Its host may replace it."""
        self._owns_process = leave is os._exit
        """Whether the worker may end the process: not if the caller has given its own `leave`."""
        # Publishing is synchronous and may wait for the broker; it must not block the loop.
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="openagents-publisher")
        self._loop_thread = loop_thread or LoopThread()
        self._owns_loop = loop_thread is None
        if self._owns_loop:
            self._loop_thread.start()
        self._loop_thread.run(self._build())
        self._service = Service(self._background_parts())

    def _all_recipients(self) -> Recipients:
        """Those of the caller, and our own: for model calls and jobs that may go on without a worker, and for
        the reports of ended runs."""
        own: list[Recipient] = []
        if self._assembly.has_background_models():
            own.append(OpenResponses(self.store, self._assembly))
        if self._assembly.has_jobs():
            own.append(OpenJobs(self.store, self._assembly))
        if (exporter := self._assembly.exporter()) is not None:
            name, export = exporter
            own.append(RunExport(self.store, export, name=name))
        return replace(self._recipients, all=(*self._recipients.all, *own)) if own else self._recipients

    async def _build(self) -> None:
        """Create the parts, on the loop."""
        settings, limits = self.settings, self._limits
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
        notices = NoticeHandlers(
            self._notice_handlers(),
            confirm=confirm_in_redis(self.store, lambda: self.heartbeat.lease.incarnation, leave=self._leave),
        )
        self._control_channel = ControlChannel(
            cell,
            on_notice=notices.handle,
            leave=self._leave,
        )
        self._completion_acks = CompletionAcks(self.store, leave=self._leave)
        self._outbox = Outbox(self.store, self._all_recipients(), leave=self._leave)
        self._backlog = Backlog(settings.broker_url)
        self.rescue = Rescue(
            self.store,
            backlog=self._backlog,
            send_wakes=self.send_wakes,
            queues=self.identity.queues,
            limits=RescueLimits(
                lease_ms=settings.lease_ms,
                heartbeat_ms=settings.heartbeat_ms,
                max_recoveries=settings.max_recoveries,
            ),
        )
        self._rescue_task: asyncio.Task[Any] | None = None
        own = this_process() if settings.watch_processes and settings.alive_look_ms else None
        check_every_s = settings.alive_look_ms / 1000
        self._local_processes = (
            LocalProcessWatch(
                own, on_dead=self._report_dead, check_every_s=check_every_s / 2, leave=self._leave
            )
            if own is not None
            else None
        )
        self.heartbeat = Heartbeat(
            cell,
            registration_of(self.identity, self._assembly, own),
            limits=HeartbeatLimits(
                times=limits, check_every_s=check_every_s * 2, max_recoveries=settings.max_recoveries
            ),
            run_host=self.runner,
            loop=self._loop_thread.loop,
            callbacks=HeartbeatCallbacks(
                send_wakes=self.send_wakes,
                on_registered=self._control_channel.follow,
                on_notice=notices.handle,
                on_lease=lambda lease: self._stall_monitor.lease_begins(lease),
                on_local_workers=self._watch_local_workers,
                on_given_up=self.rescue.check_leases_now,
                loop_lag_ms=lambda: self._watchdog.take_lag_ms(),
                part_problems=lambda: self._service.problems_json(),
            ),
            process=ProcessControls(leave=self._leave),
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
        self._watchdog = LoopWatchdog(
            WatchedLoop.of(self._loop_thread),
            lease=lambda: self.heartbeat.lease,
            run_host=self.runner,
            limits=WatchdogLimits(tick_s=limits.watch_tick_s, dead_after_s=limits.loop_dead_s),
            callbacks=WatchdogCallbacks(
                busy_tool_threads=lambda: self._assembly.offload.stats()["threads"]["busy"],
                accuse=lambda run_id: accuse_run(
                    cell,
                    within_s=limits.accuse_s,
                    run_id=run_id,
                    incarnation=self.heartbeat.lease.incarnation,
                ),
                executing=self._marks.executing_on_loop,
                on_work_began=self._stall_monitor.work_begins,
            ),
            leave=self._leave,
        )

    def _notice_handlers(self) -> Mapping[str, NoticeHandler]:
        """What this process does with a notice, by the kind of the notice. A subclass adds kinds."""
        return {
            CANCEL: lambda notice: self.runner.latch(notice.run_id, LatchReason.CANCELLED),
            FACT: lambda notice: self.runner.announce_fact(notice.run_id, int(notice.fields["number"])),
        }

    def _background_parts(self) -> list[BackgroundPart]:
        """All background parts in the order of their start; they stop in the reverse order.

        A subclass adds its own parts at the beginning.
        """
        acks, control_channel = self._completion_acks, self._control_channel
        parts: list[BackgroundPart | None] = [
            self._monitoring(),
            WorkerTracing() if self._owns_process and wants_tracing() else None,
            LoopPart("completion acks", self._loop_thread, health=acks.health, on_stop=acks.aclose),
            LoopPart(
                "control channel",
                self._loop_thread,
                health=control_channel.health,
                on_stop=control_channel.aclose,
            ),
            LoopPart(
                "outbox",
                self._loop_thread,
                health=self._outbox.health,
                on_start=self._outbox.start,
                on_stop=self._outbox.aclose,
            ),
            LoopPart(
                "rescue",
                self._loop_thread,
                health=self.rescue.health,
                on_start=self._start_rescue,
                on_stop=self._stop_rescue,
            ),
            self.heartbeat,
            self._local_processes,
            self._watchdog,
            self._stall_monitor if self._owns_process else None,  # it would kill a process of its caller
        ]
        return [part for part in parts if part is not None]

    def _monitoring(self) -> BackgroundPart | None:
        """The part that serves metrics and probes; None without a port, or in a process of its caller."""
        if self.settings.metrics_port is self.settings.health_port is None or not self._owns_process:
            return None
        # Here, so that a worker without these ports does not load an HTTP server.
        from openagents_worker.worker.worker_monitoring import ObservedWorker, WorkerMonitoring

        observed = ObservedWorker(
            runner=self.runner,
            watchdog=self._watchdog,
            lease=lambda: self.heartbeat.lease,
            is_consuming=lambda: self.is_consuming(),
            parts=lambda: self._service.reports(),
            tools=self._assembly.offload.stats,
            max_runs=self.identity.max_runs,
        )
        return WorkerMonitoring(self.settings, self.store.cell, observed, leave=self._leave)

    def start(self) -> None:
        """Start the background parts; returns before Redis has answered."""
        if self._owns_process:
            tune_interpreter()
        self._service.start()

    def _watch_local_workers(self, workers: Mapping[str, str]) -> None:
        if self._local_processes is not None:
            self._local_processes.watch(workers)

    def _report_dead(self, dead: Mapping[str, ProcessIdentity]) -> None:
        self._loop_thread.call_soon(self.rescue.note_dead, dead)

    async def _start_rescue(self) -> None:
        self._rescue_task = background_task(self.rescue.run(), name="rescue", leave=self._leave)

    async def _stop_rescue(self) -> None:
        """End the rescue loop. Our own runs are reclaimed now if the end of our lease has left some."""
        if self._rescue_task is not None:
            await end_task(self._rescue_task)
        if self.heartbeat.has_left_runs:
            try:
                # Other workers would reclaim them only after the planned expiry of our lease.
                await self.rescue.reclaim_all()
            except RedisUnreachable as error:
                log.warning("worker.runs_left", error=error.message)

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
        """Figures for operators, including the health of each background part."""
        return {
            "incarnation": self.heartbeat.lease.incarnation,
            "runs": len(self.runner.known()),
            "loop": self._watchdog.stats(),
            "tools": self._assembly.offload.stats(),
            "parts": self._service.health(),
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
        self._service.stop()
        self._loop_thread.run(self._close_connections())
        self._publisher.shutdown()
        if self._owns_loop:
            self._loop_thread.stop()
        log.info("worker.stopped", incarnation=self.heartbeat.lease.incarnation)
        line_groups.flush()

    async def _close_connections(self) -> None:
        """Close what the parts have used, on the loop."""
        await self._backlog.aclose()
        await self._assembly.aclose()
        await self.store.close()
