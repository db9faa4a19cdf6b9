"""The watch. The only place that looks at this process from beside: does its loop live, may it still act?

A thread that never waits for Redis nor long for the loop: it is there for when they do not answer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.marks import Executing
from openagents_worker.telemetry.logs import get_logger, line_groups
from openagents_worker.worker.background import background_thread
from openagents_worker.worker.heartbeat import RunHost
from openagents_worker.worker.lease import WorkerLease
from openagents_worker.worker.loop_thread import context_of

__all__ = ["EX_LOOP_DEAD", "LoopWatchdog", "WatchedRuns"]

log = get_logger(__name__)

EX_LOOP_DEAD = 70  # EX_SOFTWARE of sysexits.h
TICK_S = 0.05  # of a process whose lease leaves time for it
IDLE_TICK_S = 1.0  # while nobody works on the loop; whoever begins to ends it
BLOCKED_S = 0.25  # a loop that is busy for so long delays every run of the process
SAY_AGAIN_S = 10.0  # of the same block, and of the same place
STOPPED_TICKS = 3
STACK_FRAMES = 8
PATTERN_TASK = "run "  # what the name of a task begins with that executes a pattern
NAMED_RUNS = 10  # of those that did not stop, in the log line


class WatchedRuns(RunHost, Protocol):
    """What the watch wants of the runner."""

    def emit(self, run_id: str, name: str, payload: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class _LoopBlock:
    """A loop that does not answer: since when, in which recorded call and code, and where its thread is."""

    since_s: float
    call: CallInfo | None
    stack: str
    run_id: str | None = None
    executing: Executing | None = None

    def fields(self) -> dict[str, Any]:
        """What a person is told of it, but for how long it took."""
        told: dict[str, Any] = {"stack": self.stack}
        if self.executing is not None:
            told |= {"agent_id": self.executing.agent_id, "plugin": self.executing.plugin}
        if self.call is not None:
            told |= {"kind": self.call.kind, "name": self.call.name, "call_id": self.call.call_id}
        return told


class LoopWatchdog:
    """Stops all runs when the lease is over; names what blocks the loop; ends a process beyond help."""

    def __init__(
        self,
        *,
        loop: asyncio.AbstractEventLoop,
        loop_thread_id: Callable[[], int | None],
        lease: Callable[[], WorkerLease],
        run_host: WatchedRuns,
        leave: Callable[[int], object] = os._exit,
        tick_s: float = TICK_S,
        dead_after_s: float = math.inf,
        threads_at_work: Callable[[], int] = lambda: 0,
        accuse: Callable[[str], object] = lambda run_id: None,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
        pause: Callable[[threading.Event, float], bool] = threading.Event.wait,
        loop_waited_s: Callable[[], float] = lambda: 0.0,
        is_busy: Callable[[], bool] = lambda: True,
        began: threading.Event | None = None,
        on_began: Callable[[], object] = lambda: None,
        executing: Callable[[], Executing | None] = lambda: None,
    ) -> None:
        """`threads_at_work` counts the threads that execute tools, which nobody can cancel. `accuse` stores
        which run has blocked the loop for good. `executing` says whose code the loop executes. `on_began` is
        called when somebody begins to work after a while in which nobody has."""
        self._loop = loop
        self._loop_thread_id = loop_thread_id
        self._lease = lease
        self._run_host = run_host
        self._leave = leave
        self._tick_s = tick_s
        self._dead_after_s = dead_after_s
        self._threads_at_work = threads_at_work
        self._accuse = accuse
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._pause = pause
        self._loop_waited_s = loop_waited_s
        self._is_busy = is_busy
        self._began = began or threading.Event()
        self._on_began = on_began
        self._executing = executing
        self._silent_s = 0.0
        self._block: _LoopBlock | None = None
        self._said_s: dict[str, float] = {}
        self._blocks = 0
        self._longest_s = 0.0
        self._lag_s = 0.0
        self._answered = threading.Event()
        self._answered.set()
        self._stopping = threading.Event()
        self._thread = background_thread(self._main, name="openagents-watch", leave=leave)
        self._not_running = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._began.set()
        if self._thread.ident is not None:
            self._thread.join()

    def stats(self) -> dict[str, int]:
        """How often the loop was blocked for a quarter of a second or more, and for how long at most."""
        return {"blocks": self._blocks, "longest_block_ms": round(self._longest_s * 1000)}

    def take_lag_ms(self) -> int:
        """For how long at most, since it was asked last, the loop has answered nobody; from any thread."""
        lag_s, self._lag_s = max(self._lag_s, self._silent_s), 0.0
        return round(lag_s * 1000)

    def _main(self) -> None:
        last_s, last_cpu_s, last_waited_s = self._clock(), self._cpu_clock(), self._loop_waited_s()
        while (tick_s := self._tick()) is not None:
            now_s, cpu_s, waited_s = self._clock(), self._cpu_clock(), self._loop_waited_s()
            # Nobody of ours is to blame while the loop is ready and gets no core.
            passed_s = max(now_s - last_s - (waited_s - last_waited_s), 0.0)
            # Nor when the whole process was stopped, which makes a tick long as well. But so does a call that
            # keeps the interpreter to itself, this thread included; then the process has used the time.
            self._look_at_loop(min(passed_s, max(cpu_s - last_cpu_s, 2 * tick_s)), tick_s)
            last_s, last_cpu_s, last_waited_s = now_s, cpu_s, waited_s
            self._look_at_lease(self._lease())

    def _tick(self) -> float | None:
        """Wait until it is time to look; returns how long that was to be, None when the watch is to end."""
        if self._is_busy():
            return None if self._pause(self._stopping, self._tick_s) else self._tick_s
        self._began.clear()
        if not self._is_busy():
            self._pause(self._began, IDLE_TICK_S)
        if self._is_busy():
            self._on_began()
        return None if self._stopping.is_set() else IDLE_TICK_S

    # --- the lease ---------------------------------------------------------------------------------------

    def _look_at_lease(self, lease: WorkerLease) -> None:
        """The lease is over: every run lets go before others may take it, or the process ends."""
        if lease.let_go.is_set() or lease.remaining_s() > 0 or self._loop.is_closed():
            return
        began_s, runs = self._clock(), len(self._run_host.known())
        latched = asyncio.run_coroutine_threadsafe(self._run_host.latch_all(LatchReason.FENCED), self._loop)
        why = None
        try:
            latched.result(lease.confirm_within_s())
            if not self._threads_end_by(began_s + lease.confirm_within_s()):
                why = "a tool in a thread goes on, and a thread cannot be stopped"
        except concurrent.futures.TimeoutError:
            why = "code of these runs goes on after its cancellation, or the event loop is blocked"
        except concurrent.futures.CancelledError:
            return  # the loop is ending, and every run with it
        except Exception as error:  # noqa: BLE001  # whatever it was: nobody can say that the runs have let go
            why = f"the runs could not be stopped: {error!r}"
        if why is None:
            log.warning("worker.let_go", incarnation=lease.incarnation, runs=runs)
            lease.let_go.set()
        elif not self._stopping.is_set():
            self._end_process_beside_successors(lease, why)

    def _threads_end_by(self, end_s: float) -> bool:
        """Whether no tool is left in a thread by then."""
        while self._threads_at_work():
            if self._clock() >= end_s or self._stopping.wait(self._tick_s):
                return False
        return True

    def _end_process_beside_successors(self, lease: WorkerLease, why: str) -> None:
        """Others may execute the runs of this process from now on: it must not go on beside them."""
        left = sorted(self._run_host.known())
        log.error(
            "worker.did_not_let_go",
            incarnation=lease.incarnation,
            why=why,
            within_s=lease.confirm_within_s(),
            runs=len(left),
            run_ids=left[:NAMED_RUNS],
            threads=self._threads_at_work(),
            exit_code=EX_LOOP_DEAD,
        )
        line_groups.flush()
        self._leave(EX_LOOP_DEAD)

    # --- the loop ----------------------------------------------------------------------------------------

    def _look_at_loop(self, passed_s: float, tick_s: float) -> None:
        """Ask the loop for a sign of life, or count for how long it has owed us one."""
        if self._has_ended():
            log.error("loop.dead", closed=self._loop.is_closed(), hint="nothing can run on it any more")
            line_groups.flush()
            self._leave(EX_LOOP_DEAD)
            return
        if self._answered.is_set():
            self._silent_s = max(passed_s - tick_s, 0.0)  # what this thread itself was held up for
        else:
            self._silent_s += passed_s
        self._lag_s = max(self._lag_s, self._silent_s)
        if self._silent_s >= self._dead_after_s:
            self._end_process_with_dead_loop()
        elif self._silent_s >= BLOCKED_S - self._tick_s:  # it may have begun a tick before it was asked
            self._see_block()
        if self._answered.is_set():
            self._answered.clear()
            self._block = None
            self._loop.call_soon_threadsafe(self._answered.set)

    def _end_process_with_dead_loop(self) -> None:
        """The heartbeat would keep the lease for ever, with nobody behind it."""
        block = self._look()
        log.error(
            "loop.dead",
            silent_s=round(self._silent_s, 1),
            run_id=block.run_id,
            exit_code=EX_LOOP_DEAD,
            **block.fields(),
        )
        try:
            if block.run_id is not None:
                self._accuse(block.run_id)
        except Exception:  # without the word about it the process ends all the same
            log.exception("run.not_accused", run_id=block.run_id)
        line_groups.flush()
        self._leave(EX_LOOP_DEAD)

    def _has_ended(self) -> bool:
        """Whether the loop is closed, or has not been running for some ticks: one that was made to stop by
        an exception is started again at once."""
        self._not_running = 0 if self._loop.is_running() else self._not_running + 1
        return self._loop.is_closed() or self._not_running >= STOPPED_TICKS

    def _see_block(self) -> None:
        if self._block is None:
            self._block = self._look()
            self._blocks += 1
            # The first thing that the loop does once it is free: the run has not gone on yet.
            self._loop.call_soon_threadsafe(self._tell_run, self._block)
        place, now_s = self._block.stack, self._clock()
        if now_s - self._said_s.get(place, -SAY_AGAIN_S) >= SAY_AGAIN_S:
            self._said_s = {where: at for where, at in self._said_s.items() if now_s - at < SAY_AGAIN_S}
            self._said_s[place] = now_s
            log.warning(
                "loop.blocked",
                silent_s=round(self._silent_s, 2),
                run_id=self._block.run_id,
                **self._block.fields(),
            )

    def _look(self) -> _LoopBlock:
        frame = sys._current_frames().get(self._loop_thread_id() or 0)
        task = asyncio.current_task(self._loop)
        call = context_of(task).get(current_call)
        executing = self._executing()
        if call is not None:
            run_id: str | None = call.run_id
        else:
            run_id = executing.run_id if executing is not None else _run_of(task)
        if executing is not None and executing.run_id != run_id:  # the loop has gone on meanwhile
            executing = None
        return _LoopBlock(self._clock() - self._silent_s, call, _stack_of(frame), run_id, executing)

    def _tell_run(self, block: _LoopBlock) -> None:
        """Called on the loop, as soon as it is free: now it is known how long it was not."""
        blocked_s = self._clock() - block.since_s
        self._longest_s = max(self._longest_s, blocked_s)
        if block.run_id is not None:
            told = {"blocked_ms": round(blocked_s * 1000), **block.fields()}
            self._run_host.emit(block.run_id, "worker.loop_blocked", told)


def _run_of(task: asyncio.Task[Any] | None) -> str | None:
    """The run whose pattern this task executes, outside of any recorded call; the attempt names it so."""
    name = task.get_name() if task is not None else ""
    return name.removeprefix(PATTERN_TASK) if name.startswith(PATTERN_TASK) else None


def _stack_of(frame: FrameType | None) -> str:
    """The innermost frames, the one that blocks first: a line that is cut short still says who it is."""
    if frame is None:
        return ""
    frames = traceback.extract_stack(frame, limit=STACK_FRAMES)
    return "\n".join(f"{f.name}: {f.line} ({f.filename}:{f.lineno})" for f in reversed(frames))
