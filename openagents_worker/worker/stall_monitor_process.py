"""The stall monitor's process: the only place that kills a worker whose interpreter is stalled.

`worker.stall_monitor` starts it as a script that imports only the standard library. It uses a few megabytes
and no thread of the worker. It reads shared memory four times a second, and less often while the worker is
idle. A worker is stalled while it does not beat although it could: it uses processor time, or all of its
threads sleep. A process that is stopped (SIGSTOP, a debugger) or waits for a core, for memory or for a disk
could not beat; that time does not count.

The worker is killed with SIGKILL, because a stalled interpreter handles no other signal. Process 1 of a
container cannot be killed from inside; it gets a signal whose handler in C exits (`worker.stall_monitor`).
"""

from __future__ import annotations

import marshal
import mmap
import os
import select
import signal
import struct
import sys
import time

TYPE_CHECKING = False  # `typing` would be a fifth of the memory of this process
if TYPE_CHECKING:
    import subprocess
    from typing import Any

CHECK_S = 0.25
IDLE_CHECK_S = 2.5  # while the worker is idle; the worker writes CHECK_NOW when work starts
CHECK_NOW = b"!"
WAITING_HZ = 5  # a thread that waits for the GIL wakes 200 times a second, less often on a busy machine
SHORTEST_HELD_S = 1.0  # the shortest stall that is ended, however short the lease is (as `time_limits`)
READY_BEFORE_S = 5.0  # before the kill: the reporter needs a second to start, several on a busy machine
DUMP_BEGINS_S, DUMP_PAUSES_S, DUMP_BYTES = 1.0, 0.2, 1_000_000
REPORT_S = 5.0  # for the report, without the time to record the run; the worker is stopped meanwhile
STOP_CHECKS, STOP_CHECK_S = 50, 0.01  # a thread that waits for a disk stops only after the read
BEATS = struct.Struct("=QdQQQ")  # the same layout as `HEAD` of `runtime.marks`
SLEEPS, STOPPED = frozenset(b"SI"), frozenset(b"Tt")

REPORTER = """\
import marshal, sys
sys.path[:] = marshal.load(sys.stdin.buffer)
from openagents_worker.worker.stall_report import main
main()
"""

Threads = dict[int, tuple[int, float]]
"""By thread id: the state, a letter of proc(5), and the used processor time in seconds."""


def threads_of(pid: int) -> Threads:
    """The state and the processor time of each thread of a process."""
    found, ticks = {}, os.sysconf("SC_CLK_TCK")
    for tid in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - `pathlib` is large
        try:
            with open(f"/proc/{pid}/task/{tid}/stat", "rb") as file:  # noqa: PTH123 - as above
                text = file.read()
        except OSError:  # the thread has ended meanwhile
            continue
        fields = text[text.rindex(b")") + 2 :].split()  # the name before it may contain any character
        found[int(tid)] = fields[0][0], (int(fields[11]) + int(fields[12])) / ticks
    return found


def voluntary_switches_of(pid: int) -> dict[int, int]:
    """The number of voluntary context switches of each thread: how often it has gone to sleep."""
    found = {}
    for tid in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - as above
        try:
            with open(f"/proc/{pid}/task/{tid}/status", "rb") as file:  # noqa: PTH123 - as above
                found[int(tid)] = int(file.read().partition(b"\nvoluntary_ctxt_switches:")[2].split()[0])
        except (OSError, IndexError):  # the thread has ended meanwhile, or the system does not count switches
            continue
    return found


def stalled_s(before: Threads, now: Threads, passed_s: float) -> float:
    """For how many of the `passed_s` seconds the process could have beaten."""
    states = {state for state, _ in now.values()}
    if states & STOPPED:
        return 0.0
    if states <= SLEEPS:
        return passed_s
    used_s = sum(max(used - before.get(tid, (0, used))[1], 0.0) for tid, (_, used) in now.items())
    return min(passed_s, used_s)


class Stall:
    """A period without beats: from the first check that saw no new beat until the next beat."""

    def __init__(self, pid: int) -> None:
        self.held_s = 0.0
        self._pid = pid
        self._first = self._last = threads_of(pid)
        self._began_s = self._checked_s = time.monotonic()
        self._switches = voluntary_switches_of(pid)

    def update(self) -> None:
        now_s, threads = time.monotonic(), threads_of(self._pid)
        # In a longer pause this process, and probably the worker too, did not run.
        self.held_s += stalled_s(self._last, threads, min(now_s - self._checked_s, 2 * CHECK_S))
        self._last, self._checked_s = threads, now_s

    def waiting(self) -> list[int]:
        """The ids of the threads that wait for the GIL."""
        least = WAITING_HZ * (time.monotonic() - self._began_s)
        now, before = voluntary_switches_of(self._pid), self._switches
        return [tid for tid, count in now.items() if tid in before and count - before[tid] >= least]

    def used_s(self) -> dict[int, float]:
        """The processor time in seconds that each thread has used during the stall."""
        return {
            tid: used - self._first[tid][1] for tid, (_, used) in self._last.items() if tid in self._first
        }


class Reporter:
    """The process that reports the stall. It loads the whole library, so it is started before the kill."""

    def __init__(self, path: list[str]) -> None:
        import subprocess  # imported here: it is large

        self._process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603 - fixed arguments, no shell
            [sys.executable, "-c", REPORTER], stdin=subprocess.PIPE
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(marshal.dumps(path))
            self._process.stdin.flush()
        except OSError:  # it has ended already; `report` returns False then
            pass

    def report(self, stall: dict[str, Any], within_s: float) -> bool:
        """Send the data of the stall and wait for the report; returns whether it was written."""
        try:
            self._process.communicate(marshal.dumps(stall), within_s)
            return self._process.returncode == 0
        except Exception:  # noqa: BLE001 - no error may delay the end of the worker
            return False
        finally:
            self.end()

    def end(self) -> None:
        self._process.kill()
        try:
            assert self._process.stdin is not None
            self._process.stdin.close()
        except OSError:  # it has ended before it has read all data
            pass
        self._process.wait()


class StallMonitorProcess:
    """Monitors the worker until it ends or is killed. `config` is sent by `worker.stall_monitor`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._pid: int = config["pid"]
        self._memory = mmap.mmap(config["memory"], 0, prot=mmap.PROT_READ)
        os.close(config["memory"])
        self._beats = -1
        self._check_s = CHECK_S
        self._stall: Stall | None = None
        self._reporter: Reporter | None = None

    def run(self) -> None:
        while not self._worker_has_ended():
            try:
                if self._check() and self._kill_worker():
                    return
            except (FileNotFoundError, ProcessLookupError):  # the worker has just ended
                continue
        self._clear_stall()

    def _worker_has_ended(self) -> bool:
        """Wait for the next check; returns whether the worker has ended.

        Its end closes our stdin, unless a child of the worker keeps the pipe open: then the parent id
        changes.
        """
        ready, _, _ = select.select([0], [], [], self._check_s)
        return bool(ready and not os.read(0, 64)) or os.getppid() != self._pid

    def _check(self) -> bool:
        """Read the beats; returns whether the worker must be killed."""
        beats, lease_end_s, _, _, is_idle = BEATS.unpack_from(self._memory)
        self._check_s = CHECK_S
        if beats != self._beats:
            self._beats = beats
            self._clear_stall()
            if is_idle:
                self._check_s = IDLE_CHECK_S
            return False
        if beats == 0:
            return False
        if self._stall is None:
            self._stall = Stall(self._pid)
            return False
        self._stall.update()
        held_s, left_s = self._stall.held_s, self._left_s(lease_end_s)
        if self._reporter is None and left_s <= READY_BEFORE_S and held_s >= 2 * CHECK_S:
            self._reporter = self._new_reporter()
        return left_s <= 0

    def _left_s(self, lease_end_s: float) -> float:
        """Seconds until the worker must be killed if the stall continues: at its lease's end at the
        latest."""
        assert self._stall is not None
        held_s = self._stall.held_s
        left_s: float = self._config["loop_dead_s"] - held_s
        if lease_end_s:
            boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            left_s = min(left_s, max(lease_end_s - boot_s, SHORTEST_HELD_S - held_s))
        return left_s

    def _clear_stall(self) -> None:
        """Forget the stall: the worker has beaten again or has ended."""
        self._stall = None
        if self._reporter is not None:
            self._reporter.end()
            self._reporter = None

    # --- the end -----------------------------------------------------------------------------------------

    def _kill_worker(self) -> bool:
        """Stop the worker, report and kill it. Returns False if it has begun to beat again meanwhile."""
        stall = self._stall
        assert stall is not None
        waiting = stall.waiting()
        os.kill(self._pid, self._config["signal"])
        stacks = self._read_stacks()
        end_by = self._config["exit_signal"] or signal.SIGKILL
        self._stop_worker()
        try:
            if BEATS.unpack_from(self._memory)[0] != self._beats:
                os.kill(self._pid, signal.SIGCONT)
                self._clear_stall()
                return False
            is_reported = self._report(
                {
                    "pid": self._pid,
                    "held_s": stall.held_s,
                    "exit_code": self._config["exit_signal"] or 128 + signal.SIGKILL,
                    "used_s": stall.used_s(),
                    "waiting": waiting,
                    "stacks": stacks.decode(errors="replace"),
                    "memory": bytes(self._memory),
                    **{name: self._config[name] for name in ("cell", "accuse_s", "log_is_json")},
                }
            )
        except BaseException:
            os.kill(self._pid, end_by)  # never leave the worker stopped
            raise
        os.kill(self._pid, end_by)
        if not is_reported:
            _write_without_library(self._pid, stall.held_s, stacks)
        return True

    def _stop_worker(self) -> None:
        """Stop the worker, because other workers may execute its runs from now on.

        Process 1 of a container cannot be stopped; its writes are refused because their fences are old.
        """
        os.kill(self._pid, signal.SIGSTOP)
        for _ in range(STOP_CHECKS):
            if self._config["exit_signal"] or all(
                state in STOPPED for state, _ in threads_of(self._pid).values()
            ):
                return
            time.sleep(STOP_CHECK_S)

    def _read_stacks(self) -> bytes:
        """The stacks that `faulthandler` writes; its signal handler does not need the GIL."""
        found, wait_s, source = b"", DUMP_BEGINS_S, self._config["stacks"]
        while len(found) < DUMP_BYTES and select.select([source], [], [], wait_s)[0]:
            found += os.read(source, 65_536)
            wait_s = DUMP_PAUSES_S
        return found

    def _report(self, stall: dict[str, Any]) -> bool:
        reporter = self._reporter or self._new_reporter()
        return reporter is not None and reporter.report(stall, self._config["accuse_s"] + REPORT_S)

    def _new_reporter(self) -> Reporter | None:
        try:
            return Reporter(self._config["path"])
        except OSError:  # no memory for a process, or the limit of processes is reached
            return None


def _write_without_library(pid: int, held_s: float, stacks: bytes) -> None:
    """Write the report to standard error if the reporter has failed."""
    line = f"loop.dead pid={pid} silent_s={held_s:.1f} the interpreter of the worker is stalled"
    os.write(2, f"{line}: the worker is killed\n".encode() + stacks + b"\n")


def main() -> None:
    for number in (
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):
        signal.signal(number, signal.SIG_IGN)  # meant for the worker, which may need time to end
    with os.fdopen(0, "rb", closefd=False) as stdin:
        try:
            config = marshal.load(stdin)  # noqa: S302 - from the worker, the parent process
        except EOFError:  # the worker has ended, or could not send the configuration
            return
    StallMonitorProcess(config).run()


if __name__ == "__main__":
    main()
