"""The worker process. The only place that joins loop, runner, heartbeat, watch and rescue."""

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
from openagents_worker.worker.drain import drain, let_go
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
    """What executes runs in one operating-system process, from its first lease to its last.

    Made and started in the process that uses it, never before a fork.
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
        bridge: LoopThread | None = None,
        leave: Leave = os._exit,
    ) -> None:
        """`max_runs` is how many runs at once the pool gives to it, for people; None: nobody knows.
        `bridge` is the loop to live on where somebody else keeps one; else it gets one of its own.

        `leave` ends the process, with an exit code, when a part of it has failed or a run cannot be stopped.
        """
        self.settings = settings
        self._limits = settings.time_limits
        self._assembly = assembly
        self._publish = send_wakes
        self._leave = leave
        # Publishing is synchronous and may have to wait for the broker; it must not hold up the loop.
        self._may_be_ended = leave is os._exit
        """Whether the process is the worker's alone: nobody ends one in which somebody else says how."""
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="openagents-publisher")
        self._bridge = bridge or LoopThread()
        self._owns_loop = bridge is None
        if self._owns_loop:
            self._bridge.start()
        self._bridge.run(self._build(node, queues, max_runs))

    async def _build(self, node: str, queues: Sequence[str], max_runs: int | None) -> None:
        settings, limits, loop = self.settings, self._limits, asyncio.get_running_loop()
        cell = cell_of(settings)
        self.store = AsyncStore(cell, answer_timeout_s=limits.run_answer_s)
        self._marks = Marks(is_shared=self._may_be_ended)
        self.runner = Runner(
            store=self.store,
            lease=lambda: self.heartbeat.lease,
            assembly=self._assembly,
            settings=settings,
            send_wakes=self.send_wakes,
            leave=self._leave,
            marks=self._marks,
        )
        self._notices = ControlChannel(
            cell,
            on_cancel=lambda run: self.runner.latch(run, LatchReason.CANCELLED),
            leave=self._leave,
        )
        look_every_s = settings.alive_look_ms / 1000
        own = this_process() if settings.watch_processes and look_every_s else None
        self._neighbours = (
            LocalProcessWatch(own, on_dead=self._note_dead, look_every_s=look_every_s / 2, leave=self._leave)
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
            on_registered=self._notices.follow,
            look_every_s=look_every_s * 2,
            process=own,
            on_neighbours=self._watch_neighbours,
            on_given_up=lambda: self.rescue.hurry(),
            max_recoveries=settings.max_recoveries,
            card=WorkerCard(
                host=socket.gethostname(),
                pid=os.getpid(),
                version=own_version(),
                queues=tuple(queues),
                agents=dict(self._assembly.hashes),
                max_runs=max_runs,
            ),
            loop_lag_ms=lambda: self._watch.take_lag_ms(),
            on_lease=lambda lease: self._guard.lease_begins(lease),
            leave=self._leave,
        )
        self._watch = LoopWatchdog(
            loop=loop,
            loop_thread_id=lambda: self._bridge.thread_id,
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
            threads_at_work=lambda: self._assembly.offload.stats()["threads"]["busy"],
            leave=self._leave,
            loop_waited_s=self._bridge.waited_s,
            is_busy=lambda: self._bridge.is_busy(),
            began=self._bridge.began,
            on_began=lambda: self._guard.work_begins(),
        )
        self._guard = StallMonitor(
            self._marks,
            cell=cell,
            limits=limits,
            loop_thread=lambda: (self._bridge.native_thread_id or 0, self._bridge.thread_id or 0),
            is_busy=lambda: self._bridge.is_busy(),
            leave=self._leave,
        )
        self._tellings = CompletionAcks(self.store, leave=self._leave)
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
        """Begin to beat, to watch and to rescue; returns before Redis has answered."""
        _settle()
        if self._may_be_ended:
            self._guard.start()
        if self._neighbours is not None:
            self._neighbours.start()
        self.heartbeat.start()
        self._watch.start()
        self._bridge.run(self._start_rescue())

    def _watch_neighbours(self, neighbours: Mapping[str, str]) -> None:
        if self._neighbours is not None:
            self._neighbours.watch(neighbours)

    def _note_dead(self, dead: Mapping[str, ProcessIdentity]) -> None:
        self._bridge.soon(self.rescue.note_dead, dead)

    async def _start_rescue(self) -> None:
        self._rescuing = background_task(self.rescue.run(), name="rescue", leave=self._leave)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the process's loop, from a task body; waits for it."""
        return self._bridge.run(work)

    def execute(self, run_id: str, format_: int) -> AttemptResult:
        """Carry a run, from a task body. A soft time limit stops the run, and then it has ended."""

        def stop(limit: Exception) -> None:
            self._bridge.soon(self.runner.interrupt, run_id, limit)

        return self._bridge.run(self.runner.execute(run_id, format_), interrupted=stop)

    def stats(self) -> dict[str, Any]:
        """What an operator may want to know of the process: its incarnation, runs, loop, tools' threads."""
        return {
            "incarnation": self.heartbeat.lease.incarnation,
            "runs": len(self.runner.known()),
            "loop": self._watch.stats(),
            "tools": self._assembly.offload.stats(),
        }

    def completion_notified(self, run_id: str, life: int, *, wait: bool) -> None:
        """Celery was told of the end of this life of the run; with `wait`, returns when that is written."""
        self._bridge.soon(self._tellings.add, run_id, life)
        if wait:
            self._bridge.run(self._tellings.aclose())

    async def send_wakes(self, wakes: Sequence[Wake]) -> None:
        """Publish wake-ups. Without a broker it is one warning: the rescue sends them again later.

        A broker that is silent does not hold up the run: the wake-ups follow when it takes them.
        """
        if not wakes:
            return
        publishing = asyncio.get_running_loop().run_in_executor(self._publisher, self._publish_quietly, wakes)
        await asyncio.wait([publishing], timeout=self._limits.publish_patience_s)

    def _publish_quietly(self, wakes: Sequence[Wake]) -> None:
        try:
            self._publish(wakes)
        except Exception as error:  # noqa: BLE001 - every broker has errors of its own
            log.warning("wakes.not_sent", runs=len(wakes), error=type(error).__name__)

    def hand_over(self) -> None:
        """Begin to hand the runs over; returns at once, also in a signal handler."""

        def begin() -> None:
            self._handing_over = background_task(self._hand_over(), name="hand over", leave=self._leave)

        self._bridge.loop.call_soon_threadsafe(begin)

    async def _hand_over(self) -> None:
        if not await drain(self.runner, self._limits) and not await let_go(self.runner, self._limits):
            self._leave_running()

    def _leave_running(self) -> None:
        """The process ends before its lease does: nobody may take the runs while their code still runs."""
        for line in self.runner.code_in_progress():
            log.error("run.does_not_stop", reason="the worker stops", exit_code=EX_DOES_NOT_STOP, **line)
        line_groups.flush()
        self._leave(EX_DOES_NOT_STOP)

    def close(self) -> None:
        """Hand the runs over, end the lease, close everything; within `DRAIN_TIMEOUT_S` and little more."""
        if not self._bridge.run(drain(self.runner, self._limits)) and not self._bridge.run(
            let_go(self.runner, self._limits)
        ):
            self._leave_running()
        self._guard.stop()
        self._watch.stop()
        if self._neighbours is not None:
            self._neighbours.stop()
        over = self.heartbeat.retire() == "OVER"
        self._bridge.run(self._close(reclaim=over))
        self._publisher.shutdown()
        if self._owns_loop:
            self._bridge.stop()
        log.info("worker.stopped", incarnation=self.heartbeat.lease.incarnation)
        line_groups.flush()

    async def _close(self, *, reclaim: bool) -> None:
        await end_task(self._rescuing)
        if reclaim:
            try:
                await (
                    self.rescue.reclaim_all()
                )  # our own runs: others would look only when our lease had ended
            except RedisUnreachable as error:
                log.warning("worker.runs_left", error=error.message)
        await self._tellings.aclose()
        await self._notices.aclose()
        await self._backlog.aclose()
        await self._assembly.aclose()
        await self.store.close()


def _settle() -> None:
    """Tell Python's garbage collector that what is loaded by now will stay.

    It would look through all of it every few hundred runs, and the loop would stand still for that long
    (180 ms were measured). And it would look for garbage every 700 objects, of which one run makes more:
    where a thousand runs wait, that is a fifth of all that is computed.
    """
    gc.collect()
    gc.freeze()
    if gc.get_threshold() == PYTHONS_GC_THRESHOLD:  # nobody has chosen another
        gc.set_threshold(*GC_THRESHOLD)


PYTHONS_GC_THRESHOLD = (700, 10, 10)
GC_THRESHOLD = (50_000, 10, 10)
