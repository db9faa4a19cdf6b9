"""The stall monitor: the only place that starts the process which kills this one when its interpreter stalls.

A call that holds the GIL stops the heartbeat, the watchdog and the handling of signals, too. Only another
process can notice it: `worker.stall_monitor_process`. That process ends with this one, however this one ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from openagents_worker.worker import stall_monitor_process as guard_process
from openagents_worker.worker.background import Leave, background_thread
from openagents_worker.worker.lease import WorkerLease

__all__ = ["StallMonitor"]

log = get_logger(__name__)

BEAT_S = 0.25
IDLE_BEAT_S = 1.0  # while nobody works; whoever begins to ends it
IDLE_AFTER_BEATS = 4  # in a row at which nobody worked: between two runs of a worker with few it is not idle
START_AGAIN_S = 30.0  # after a guard's process has ended before its time
STOP_S = 5.0  # for it to end; it only has to notice that its stdin is closed

_taken: set[int] = set()
"""The signals that guards of this process have registered."""


class StallMonitor:
    """Beats in the memory of `marks`, and keeps a process that listens to it."""

    def __init__(
        self,
        marks: Marks,
        *,
        cell: Cell,
        limits: TimeLimits,
        loop_thread: Callable[[], tuple[int, int]],
        is_busy: Callable[[], bool] = lambda: True,
        leave: Leave = os._exit,
    ) -> None:
        """`loop_thread` gives the event loop's thread as the system and as Python number it; `is_busy` says
        whether anybody works."""
        self._marks = marks
        self._cell = cell
        self._limits = limits
        self._loop_thread = loop_thread
        self._is_busy = is_busy
        self._is_idle, self._quiet_beats = False, 0
        self._lease = WorkerLease.none_yet(limits)
        self._beating = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._start_again_at_s = 0.0
        self._signal = self._exit_signal = 0
        self._stacks = -1
        self._stopping = False
        self._woken = threading.Event()
        self._thread = background_thread(self._main, name="openagents-guard", leave=leave)

    def start(self) -> None:
        """Start the guard's process: what executes from here on is guarded."""
        problem = _why_not(self._marks)
        if problem is not None:
            log.info("guard.unavailable", problem=problem)
            return
        self._marks.set_loop_thread(*self._loop_thread())
        self._beat()
        self._keep_process()
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._woken.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._end_process()
        self._marks.close()

    def lease_begins(self, lease: WorkerLease) -> None:
        """From here on runs may be claimed under this lease; from any thread."""
        self._lease = lease
        self._beat()

    def work_begins(self) -> None:
        """Somebody works from here on: beats and looks come often again; from any thread."""
        if self._is_idle:
            self._woken.set()

    @property
    def pid(self) -> int | None:
        """The guard's process; None where there is none."""
        return self._process.pid if self._process is not None else None

    # --- in the thread ---

    def _main(self) -> None:
        while not self._stopping:
            self._woken.wait(IDLE_BEAT_S if self._is_idle else BEAT_S)
            if self._woken.is_set() or self._is_busy():
                self._quiet_beats = 0
            else:
                self._quiet_beats += 1
            self._woken.clear()
            was_idle, self._is_idle = self._is_idle, self._quiet_beats >= IDLE_AFTER_BEATS
            self._beat()
            if was_idle and not self._is_idle:
                self._wake_process()
            self._keep_process()

    def _beat(self) -> None:
        with self._beating:
            lease = self._lease
            self._marks.beat(0.0 if lease.let_go.is_set() else lease.end_s, is_idle=self._is_idle)

    def _wake_process(self) -> None:
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it has ended, or has words of ours to read still
                os.write(process.stdin.fileno(), guard_process.LOOK_NOW)

    def _keep_process(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        now_s = time.monotonic()
        if self._process is not None:
            log.warning("guard.ended", pid=self._process.pid, exit_code=self._process.returncode)
            self._end_process()
            self._start_again_at_s = now_s + START_AGAIN_S
        elif now_s >= self._start_again_at_s:
            self._start_again_at_s = now_s + START_AGAIN_S
            self._begin_process()

    def _begin_process(self) -> None:
        read, self._stacks = os.pipe()
        try:
            if os.getpid() == 1:
                self._exit_signal = _take_signal()
                _exit_on(self._exit_signal)
            self._signal = _take_signal()
            # Handled in C: it needs no interpreter.
            faulthandler.register(self._signal, file=self._stacks, all_threads=True, chain=False)
            self._process = subprocess.Popen(  # noqa: S603 - our own arguments, no shell
                [sys.executable, "-I", "-S", guard_process.__file__],
                stdin=subprocess.PIPE,
                stdout=_log_stream(),
                stderr=_log_stream(),
                pass_fds=(self._marks.fd, read),
                start_new_session=True,  # what a terminal sends to the worker's group is the worker's
            )
            assert self._process.stdin is not None
            self._process.stdin.write(marshal.dumps(self._told(read)))
            self._process.stdin.flush()
            os.set_blocking(self._process.stdin.fileno(), False)
        except (OSError, ValueError, RuntimeError, ImportError, AttributeError) as error:
            log.warning("guard.not_started", error=f"{type(error).__name__}: {error}")
            self._end_process()
        finally:
            os.close(read)

    def _told(self, stacks: int) -> dict[str, object]:
        return {
            "pid": os.getpid(),
            "memory": self._marks.fd,
            "stacks": stacks,
            "signal": self._signal,
            "exit_signal": self._exit_signal,
            "loop_dead_s": self._limits.loop_dead_s,
            "accuse_s": self._limits.accuse_s,
            "cell": dataclasses.asdict(self._cell),
            "path": [str(entry) for entry in sys.path],
            "log_is_json": is_json_log(),
        }

    def _end_process(self) -> None:
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
        _taken.difference_update({self._signal, self._exit_signal})  # the latter is handled as before
        self._signal = self._exit_signal = 0
        stacks, self._stacks = self._stacks, -1
        if stacks >= 0:
            os.close(stacks)


def _why_not(marks: Marks) -> str | None:
    """Why no process can look after this one; None where one can."""
    if marks.fd < 0 or not hasattr(signal, "SIGRTMIN"):
        return "this system has no memory files or no real-time signals"
    try:
        guard_process.threads_of(os.getpid())
    except (OSError, ValueError, IndexError) as error:
        return f"/proc does not show the threads of this process: {error}"
    if not sys.executable or not Path(guard_process.__file__).is_file():
        return "there is no interpreter or no file to start"
    return None


def _take_signal() -> int:
    """A signal that nobody handles. Raises `RuntimeError` where there is none."""
    for number in range(signal.SIGRTMAX, signal.SIGRTMIN, -1):
        if number not in _taken and signal.getsignal(number) == signal.SIG_DFL:
            _taken.add(number)
            return number
    raise RuntimeError("all real-time signals are handled by somebody")


def _exit_on(number: int) -> None:
    """Let this signal end the process, with its number as the exit code, and without the interpreter.

    Process 1 of a container needs that: the kernel lets no other process of the container kill or stop it.
    """
    import ctypes  # seldom: not part of every Python, and not small

    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(number, ctypes.cast(libc._exit, ctypes.c_void_p))


def _log_stream() -> int:
    """The open file that this process's log is written to."""
    for logger in (logging.getLogger("openagents_worker"), logging.getLogger()):
        for handler in logger.handlers:
            with contextlib.suppress(AttributeError, OSError, ValueError):
                return int(handler.stream.fileno())  # type: ignore[attr-defined]  # where it has one
    return 2
