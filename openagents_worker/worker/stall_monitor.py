"""The stall monitor: the only place that starts the process which kills this one when its interpreter stalls.

A call that holds the GIL also stops the heartbeat, the watchdog and the handling of signals. Only another
process can detect it: `worker.stall_monitor_process`. That process always ends together with this one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import marshal
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from openagents_worker.runtime.marks import Marks
from openagents_worker.store.client import Cell
from openagents_worker.telemetry.logs import get_logger, is_json_log
from openagents_worker.time_limits import TimeLimits
from openagents_worker.worker import stall_monitor_process as monitor_process
from openagents_worker.worker.background import LATE_AFTER_S, UNAVAILABLE, Health, Leave, background_thread
from openagents_worker.worker.lease import WorkerLease

__all__ = ["StallMonitor"]

log = get_logger(__name__)

BEAT_S = 0.25
IDLE_BEAT_S = 1.0  # while no task runs on the loop; the start of a task ends the wait
IDLE_AFTER_BEATS = 4  # consecutive beats without work, so that a short gap between two runs is not idle
START_AGAIN_S = 30.0  # the delay before a monitor process that ended unexpectedly is replaced
STOP_S = 5.0  # the time in which the monitor process must end after its stdin is closed

_reserved_signals: set[int] = set()
"""The signals that stall monitors of this process use."""


class StallMonitor:
    """Writes beats into the shared memory of `marks`, and keeps the monitor process running."""

    name = "stall monitor"

    def __init__(
        self,
        marks: Marks,
        *,
        cell: Cell,
        limits: TimeLimits,
        loop_thread_ids: Callable[[], tuple[int, int]],
        is_busy: Callable[[], bool] = lambda: True,
        leave: Leave = os._exit,
    ) -> None:
        """`loop_thread_ids` returns the operating system's and Python's id of the event loop's thread.
        `is_busy` returns whether a task runs on the loop.
        """
        self._marks = marks
        self._cell = cell
        self._limits = limits
        self._loop_thread_ids = loop_thread_ids
        self._is_busy = is_busy
        self._is_idle, self._idle_beats = False, 0
        self._lease = WorkerLease.none_yet(limits)
        self._beating = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._start_again_at_s = 0.0
        self._signal = self._exit_signal = 0
        self._stacks = -1
        self._stopping = False
        self._woken = threading.Event()
        self._thread = background_thread(self._main, name="openagents-stall-monitor", leave=leave)
        self.health = Health(late_after_s=LATE_AFTER_S)

    def start(self) -> None:
        """Start the monitor process: runs are monitored from here on."""
        problem = _unsupported_reason(self._marks)
        if problem is not None:
            self.health.failed(problem, code=UNAVAILABLE)
            log.info("guard.unavailable", problem=problem)
            return
        self._marks.set_loop_thread(*self._loop_thread_ids())
        self._beat()
        self._ensure_process()
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._woken.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._end_process()
        self._marks.close()

    def lease_begins(self, lease: WorkerLease) -> None:
        """Note the lease under which runs may be claimed from now on. Thread-safe."""
        self._lease = lease
        self._beat()

    def work_begins(self) -> None:
        """End the idle state: beats and checks become frequent again. Thread-safe."""
        if self._is_idle:
            self._woken.set()

    @property
    def pid(self) -> int | None:
        """The process id of the monitor process; None if it does not run."""
        return self._process.pid if self._process is not None else None

    # --- in the thread ---

    def _main(self) -> None:
        while not self._stopping:
            self._woken.wait(IDLE_BEAT_S if self._is_idle else BEAT_S)
            if self._woken.is_set() or self._is_busy():
                self._idle_beats = 0
            else:
                self._idle_beats += 1
            self._woken.clear()
            was_idle, self._is_idle = self._is_idle, self._idle_beats >= IDLE_AFTER_BEATS
            self._beat()
            if was_idle and not self._is_idle:
                self._wake_process()
            self._ensure_process()
            if self._process is not None:
                self.health.succeeded()

    def _beat(self) -> None:
        with self._beating:
            lease = self._lease
            self._marks.beat(0.0 if lease.runs_stopped.is_set() else lease.end_s, is_idle=self._is_idle)

    def _wake_process(self) -> None:
        """Make the monitor process check now."""
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it has ended, or its pipe is full
                os.write(process.stdin.fileno(), monitor_process.CHECK_NOW)

    def _ensure_process(self) -> None:
        """Start the monitor process if it does not run; after a failure only after `START_AGAIN_S`."""
        if self._process is not None and self._process.poll() is None:
            return
        now_s = time.monotonic()
        if self._process is not None:
            self.health.failed(
                f"the monitor process has ended with {self._process.returncode}", code="guard.ended"
            )
            log.warning("guard.ended", pid=self._process.pid, exit_code=self._process.returncode)
            self._end_process()
            self._start_again_at_s = now_s + START_AGAIN_S
        elif now_s >= self._start_again_at_s:
            self._start_again_at_s = now_s + START_AGAIN_S
            self._start_process()

    def _start_process(self) -> None:
        read, self._stacks = os.pipe()
        try:
            if os.getpid() == 1:
                self._exit_signal = _reserve_signal()
                _make_signal_exit(self._exit_signal)
            self._signal = _reserve_signal()
            # The handler is in C: it does not need the GIL.
            faulthandler.register(self._signal, file=self._stacks, all_threads=True, chain=False)
            self._process = subprocess.Popen(  # noqa: S603 - fixed arguments, no shell
                [sys.executable, "-I", "-S", monitor_process.__file__],
                stdin=subprocess.PIPE,
                stdout=_log_stream(),
                stderr=_log_stream(),
                pass_fds=(self._marks.fd, read),
                start_new_session=True,  # signals of a terminal go to the worker alone
            )
            assert self._process.stdin is not None
            self._process.stdin.write(marshal.dumps(self._process_config(read)))
            self._process.stdin.flush()
            os.set_blocking(self._process.stdin.fileno(), False)
        except (OSError, ValueError, RuntimeError, ImportError, AttributeError) as error:
            self.health.failed(error)
            log.warning("guard.not_started", error=f"{type(error).__name__}: {error}")
            self._end_process()
        finally:
            os.close(read)

    def _process_config(self, stacks: int) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "memory": self._marks.fd,
            "stacks": stacks,
            "signal": self._signal,
            "exit_signal": self._exit_signal,
            "loop_dead_s": self._limits.loop_dead_s,
            "accuse_s": self._limits.accuse_s,
            "cell": self._cell.without_codec(),
            "path": [str(entry) for entry in sys.path],
            "log_is_json": is_json_log(),
        }

    def _end_process(self) -> None:
        """End the monitor process and release its signals and pipe."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._signal:
            faulthandler.unregister(self._signal)
        _reserved_signals.difference_update(
            {self._signal, self._exit_signal}
        )  # the handler of the exit signal stays installed
        self._signal = self._exit_signal = 0
        stacks, self._stacks = self._stacks, -1
        if stacks >= 0:
            os.close(stacks)


def _unsupported_reason(marks: Marks) -> str | None:
    """Why this process cannot be monitored; None if it can."""
    if marks.fd < 0 or not hasattr(signal, "SIGRTMIN"):
        return "this system has no memory files or no real-time signals"
    try:
        monitor_process.threads_of(os.getpid())
    except (OSError, ValueError, IndexError) as error:
        return f"/proc does not show the threads of this process: {error}"
    if not sys.executable or not Path(monitor_process.__file__).is_file():
        return "the Python interpreter or the file of the monitor process does not exist"
    return None


def _reserve_signal() -> int:
    """A real-time signal without a handler. Raises `RuntimeError` if all of them have one."""
    for number in range(signal.SIGRTMAX, signal.SIGRTMIN, -1):
        if number not in _reserved_signals and signal.getsignal(number) == signal.SIG_DFL:
            _reserved_signals.add(number)
            return number
    raise RuntimeError("all real-time signals have handlers")


def _make_signal_exit(number: int) -> None:
    """Make this signal end the process with the signal's number as the exit code, without the interpreter.

    Process 1 of a container needs it: no other process of the container can kill or stop process 1.
    """
    import ctypes  # imported here: rarely needed, large, and not in every Python

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(number, ctypes.cast(libc._exit, ctypes.c_void_p))


def _log_stream() -> int:
    """The file descriptor of this process's log."""
    for logger in (logging.getLogger("openagents_worker"), logging.getLogger()):
        for handler in logger.handlers:
            with contextlib.suppress(AttributeError, OSError, ValueError):
                return int(handler.stream.fileno())  # type: ignore[attr-defined]  # not every handler has a stream
    return 2
