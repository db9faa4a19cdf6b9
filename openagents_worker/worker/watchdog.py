"""The loop watchdog: the only place that checks from a separate thread that this process may go on.

It checks that the event loop answers and that the lease is valid. The thread makes no call to Redis and
does not block on the loop for long, so that it works when either of them does not answer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol, Self

from openagents_worker.llm.base import CallInfo, current_call
from openagents_worker.runtime.latch import LatchReason
from openagents_worker.runtime.marks import Executing
from openagents_worker.telemetry.logs import get_logger, line_groups
from openagents_worker.worker.background import LATE_AFTER_S, Health, Leave, background_thread
from openagents_worker.worker.heartbeat import RunHost
from openagents_worker.worker.lease import WorkerLease
from openagents_worker.worker.loop_thread import LoopThread, context_of
from openagents_worker.worker.thread_stack import frames_of

__all__ = [
    "EX_LOOP_DEAD",
    "LoopWatchdog",
    "WatchdogCallbacks",
    "WatchdogClocks",
    "WatchdogLimits",
    "WatchedLoop",
    "WatchedRuns",
]

log = get_logger(__name__)

EX_LOOP_DEAD = 70  # EX_SOFTWARE of sysexits.h
TICK_S = 0.05  # the default; `TimeLimits.watch_tick_s` shortens it with the lease
IDLE_TICK_S = 1.0  # while no task runs on the loop; the start of a task ends the wait
BLOCKED_S = 0.25  # a block of this duration delays every run of the process
LOG_AGAIN_S = 10.0  # between two log lines about the same stack
STOPPED_TICKS = 3
STACK_FRAMES = 8
PATTERN_TASK = "run "  # prefix of the name of an asyncio task that executes a pattern
NAMED_RUNS = 10  # how many of the runs that did not stop the log line lists


class WatchedRuns(RunHost, Protocol):
    """What the watchdog needs from the runner."""

    def emit(self, run_id: str, name: str, payload: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class _LoopBlock:
    """One period in which the loop did not answer: its start, the recorded call and the stack of the loop."""

    since_s: float
    call: CallInfo | None
    stack: str
    run_id: str | None = None
    executing: Executing | None = None

    def fields(self) -> dict[str, Any]:
        """The fields of the log line and of the event, without the duration."""
        fields: dict[str, Any] = {"stack": self.stack}
        if self.executing is not None:
            fields |= {"agent_id": self.executing.agent_id, "plugin": self.executing.plugin}
        if self.call is not None:
            fields |= {"kind": self.call.kind, "name": self.call.name, "call_id": self.call.call_id}
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedLoop:
    """The loop of the process as the watchdog sees it; see `LoopThread` for the fields."""

    loop: asyncio.AbstractEventLoop
    thread_id: Callable[[], int | None]
    waited_s: Callable[[], float] = lambda: 0.0
    is_busy: Callable[[], bool] = lambda: True
    work_began: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(cls, loop_thread: LoopThread) -> Self:
        return cls(
            loop=loop_thread.loop,
            thread_id=lambda: loop_thread.thread_id,
            waited_s=loop_thread.waited_s,
            is_busy=lambda: loop_thread.is_busy(),  # a pool replaces this function later
            work_began=loop_thread.work_began,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogLimits:
    """The time between two checks, and after how long without an answer the loop is dead."""

    tick_s: float = TICK_S
    dead_after_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogCallbacks:
    """What the watchdog calls in its thread.

    `busy_tool_threads` counts the threads that execute tools, which cannot be cancelled. `accuse` stores in
    Redis which run has blocked the loop for good. `executing` returns the plugin code that the loop executes
    now. `on_work_began` is called when a task starts on an idle loop.
    """

    busy_tool_threads: Callable[[], int] = lambda: 0
    accuse: Callable[[str], object] = lambda run_id: None
    executing: Callable[[], Executing | None] = lambda: None
    on_work_began: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogClocks:
    """The clocks of the watchdog. `pause` waits for an event, at most for some seconds."""

    clock: Callable[[], float] = time.monotonic
    cpu_clock: Callable[[], float] = time.process_time
    pause: Callable[[threading.Event, float], bool] = threading.Event.wait


class LoopWatchdog:
    """Stops all runs when the lease is over, logs what blocks the loop, ends a process whose loop is dead."""

    name = "watchdog"

    def __init__(
        self,
        watched: WatchedLoop,
        *,
        lease: Callable[[], WorkerLease],
        run_host: WatchedRuns,
        limits: WatchdogLimits = WatchdogLimits(),
        callbacks: WatchdogCallbacks = WatchdogCallbacks(),
        clocks: WatchdogClocks = WatchdogClocks(),
        leave: Leave = os._exit,
    ) -> None:
        self._watched = watched
        self._loop = watched.loop
        self._lease = lease
        self._run_host = run_host
        self._limits = limits
        self._callbacks = callbacks
        self._clocks = clocks
        self._clock = clocks.clock
        self._leave = leave
        self._silent_s = 0.0
        self._ticked_s = 0.0
        """When the loop was last looked at. This thread may have waited for the interpreter since then."""
        self._block: _LoopBlock | None = None
        self._logged_at_s: dict[str, float] = {}
        self._blocks = 0
        self._longest_s = 0.0
        self._lag_s = 0.0
        self._taken_lag_s = 0.0
        self._answered = threading.Event()
        self._answered.set()
        self._stopping = threading.Event()
        self._thread = background_thread(self._main, name="openagents-watchdog", leave=leave)
        self._not_running = 0
        self.health = Health(late_after_s=LATE_AFTER_S)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._watched.work_began.set()
        if self._thread.ident is not None:
            self._thread.join()

    def stats(self) -> dict[str, int]:
        """How often the loop was blocked for 250 ms or longer, and the longest block."""
        return {"blocks": self._blocks, "longest_block_ms": round(self._longest_s * 1000)}

    def take_lag_ms(self) -> int:
        """The longest time without an answer of the loop since the previous call of this method.
        Thread-safe."""
        self._taken_lag_s, self._lag_s = max(self._lag_s, self._silent_s), 0.0
        return round(self._taken_lag_s * 1000)

    def lag_s(self) -> float:
        """The longest time without an answer of the loop since the last but one call of `take_lag_ms`.
        Thread-safe."""
        return max(self._lag_s, self._silent_s, self._taken_lag_s)

    def silent_s(self) -> float:
        """For how long the loop has not answered. Thread-safe."""
        return self._silent_s

    def _main(self) -> None:
        last_s, last_cpu_s, last_waited_s = self._clock(), self._clocks.cpu_clock(), self._watched.waited_s()
        while (tick_s := self._wait_for_tick()) is not None:
            now_s, cpu_s, waited_s = self._clock(), self._clocks.cpu_clock(), self._watched.waited_s()
            # Do not count time in which the loop's thread was runnable but had no core.
            passed_s = max(now_s - last_s - (waited_s - last_waited_s), 0.0)
            # Do not count time in which the whole process was stopped (SIGSTOP), which delays this tick too.
            # A call that holds the GIL also delays it, but uses processor time: that distinguishes the two.
            self._ticked_s = now_s
            self._check_loop(min(passed_s, max(cpu_s - last_cpu_s, 2 * tick_s)), tick_s)
            last_s, last_cpu_s, last_waited_s = now_s, cpu_s, waited_s
            self._check_lease(self._lease())
            self.health.succeeded()

    def _wait_for_tick(self) -> float | None:
        """Wait for one tick. Returns its planned length in seconds, or None when the watchdog must end."""
        if self._watched.is_busy():
            return None if self._clocks.pause(self._stopping, self._limits.tick_s) else self._limits.tick_s
        self._watched.work_began.clear()
        if not self._watched.is_busy():
            self._clocks.pause(self._watched.work_began, IDLE_TICK_S)
        if self._watched.is_busy():
            self._callbacks.on_work_began()
        return None if self._stopping.is_set() else IDLE_TICK_S

    # --- the lease ---------------------------------------------------------------------------------------

    def _check_lease(self, lease: WorkerLease) -> None:
        """When the lease is over, stop every run before another worker may take it, or end the process."""
        if lease.runs_stopped.is_set() or lease.remaining_s() > 0 or self._loop.is_closed():
            return
        began_s, runs = self._clock(), len(self._run_host.known())
        latched = asyncio.run_coroutine_threadsafe(self._run_host.latch_all(LatchReason.FENCED), self._loop)
        why = None
        try:
            latched.result(lease.confirm_within_s())
            if not self._tool_threads_end_by(began_s + lease.confirm_within_s()):
                why = "a tool still runs in a thread, and a thread cannot be stopped"
        except concurrent.futures.TimeoutError:
            why = "code of these runs continues after its cancellation, or the event loop is blocked"
        except concurrent.futures.CancelledError:
            return  # the loop is ending, and every run with it
        except Exception as error:  # noqa: BLE001  # then the runs may not have stopped
            why = f"the runs could not be stopped: {error!r}"
        if why is None:
            log.warning("worker.let_go", incarnation=lease.incarnation, runs=runs)
            lease.runs_stopped.set()
        elif not self._stopping.is_set():
            self._end_process_with_lost_lease(lease, why)

    def _tool_threads_end_by(self, end_s: float) -> bool:
        """Whether all tools that run in threads have returned before `end_s`."""
        while self._callbacks.busy_tool_threads():
            if self._clock() >= end_s or self._stopping.wait(self._limits.tick_s):
                return False
        return True

    def _end_process_with_lost_lease(self, lease: WorkerLease, why: str) -> None:
        """End the process: other workers may execute its runs from now on."""
        left = sorted(self._run_host.known())
        log.error(
            "worker.did_not_let_go",
            incarnation=lease.incarnation,
            why=why,
            within_s=lease.confirm_within_s(),
            runs=len(left),
            run_ids=left[:NAMED_RUNS],
            threads=self._callbacks.busy_tool_threads(),
            exit_code=EX_LOOP_DEAD,
        )
        line_groups.flush()
        self._leave(EX_LOOP_DEAD)

    # --- the loop ----------------------------------------------------------------------------------------

    def _check_loop(self, passed_s: float, tick_s: float) -> None:
        """Schedule a callback on the loop, or count for how long the previous one has not been called."""
        if self._has_ended():
            log.error("loop.dead", closed=self._loop.is_closed(), hint="no task can run on it any more")
            line_groups.flush()
            self._leave(EX_LOOP_DEAD)
            return
        if self._answered.is_set():
            self._silent_s = max(passed_s - tick_s, 0.0)  # the delay of this thread itself
        else:
            self._silent_s += passed_s
        self._lag_s = max(self._lag_s, self._silent_s)
        if self._silent_s >= self._limits.dead_after_s:
            self._end_process_with_dead_loop()
        # The block may have begun one tick before the callback was scheduled.
        elif self._silent_s >= BLOCKED_S - self._limits.tick_s:
            self._note_block()
        if self._answered.is_set():
            self._answered.clear()
            self._block = None
            self._loop.call_soon_threadsafe(self._answered.set)

    def _end_process_with_dead_loop(self) -> None:
        """End the process: the heartbeat would renew the lease for ever although no run makes progress."""
        block = self._inspect_loop()
        log.error(
            "loop.dead",
            silent_s=round(self._silent_s, 1),
            run_id=block.run_id,
            exit_code=EX_LOOP_DEAD,
            **block.fields(),
        )
        try:
            if block.run_id is not None:
                self._callbacks.accuse(block.run_id)
        except Exception:  # the process ends even if the run cannot be recorded
            log.exception("run.not_accused", run_id=block.run_id)
        line_groups.flush()
        self._leave(EX_LOOP_DEAD)

    def _has_ended(self) -> bool:
        """Whether the loop is closed, or has not been running for `STOPPED_TICKS` ticks.

        A loop that an exception has stopped is started again at once, within fewer ticks.
        """
        self._not_running = 0 if self._loop.is_running() else self._not_running + 1
        return self._loop.is_closed() or self._not_running >= STOPPED_TICKS

    def _note_block(self) -> None:
        """Count a new block, and log it once per stack and `LOG_AGAIN_S`."""
        if self._block is None:
            self._block = self._inspect_loop()
            self._blocks += 1
            # The loop calls this first when it is free again, before the run continues.
            self._loop.call_soon_threadsafe(self._emit_block_event, self._block)
        stack, now_s = self._block.stack, self._clock()
        if now_s - self._logged_at_s.get(stack, -LOG_AGAIN_S) >= LOG_AGAIN_S:
            self._logged_at_s = {
                each: at for each, at in self._logged_at_s.items() if now_s - at < LOG_AGAIN_S
            }
            self._logged_at_s[stack] = now_s
            log.warning(
                "loop.blocked",
                silent_s=round(self._silent_s, 2),
                run_id=self._block.run_id,
                **self._block.fields(),
            )

    def _inspect_loop(self) -> _LoopBlock:
        """The recorded call, the run and the stack of the loop's thread."""
        frames = frames_of(self._watched.thread_id() or 0)
        task = asyncio.current_task(self._loop)
        call = context_of(task).get(current_call)
        executing = self._callbacks.executing()
        if call is not None:
            run_id: str | None = call.run_id
        else:
            run_id = executing.run_id if executing is not None else _run_id_of_task(task)
        if executing is not None and executing.run_id != run_id:  # the loop has executed other code meanwhile
            executing = None
        return _LoopBlock(self._ticked_s - self._silent_s, call, _format_stack(frames), run_id, executing)

    def _emit_block_event(self, block: _LoopBlock) -> None:
        """Emit `worker.loop_blocked` with the duration. Called on the loop as soon as it is free."""
        blocked_s = self._clock() - block.since_s
        self._longest_s = max(self._longest_s, blocked_s)
        if block.run_id is not None:
            payload = {"blocked_ms": round(blocked_s * 1000), **block.fields()}
            self._run_host.emit(block.run_id, "worker.loop_blocked", payload)


def _run_id_of_task(task: asyncio.Task[Any] | None) -> str | None:
    """The run whose pattern this task executes; the attempt names the task after the run."""
    name = task.get_name() if task is not None else ""
    return name.removeprefix(PATTERN_TASK) if name.startswith(PATTERN_TASK) else None


def _format_stack(frames: Sequence[FrameType]) -> str:
    """The innermost frames, the blocking one first, so that a truncated log line still contains it."""
    innermost = traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames[:STACK_FRAMES])
    return "\n".join(f"{f.name}: {f.line} ({f.filename}:{f.lineno})" for f in innermost)
