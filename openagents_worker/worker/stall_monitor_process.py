"""The stall monitor's process: the only place that kills a worker whose interpreter stands still.

`worker.stall_monitor` starts it as a script that imports only the standard library. It takes a few megabytes,
and reads shared memory four times a second, less often while no run is executed. It needs no
thread of the worker. The worker's process counts as standing still while it does not beat, although it could:
it computes, or all of its threads sleep. A process that is stopped (SIGSTOP, a debugger), that waits for a
core, for its memory or for a disk could not beat, and nobody is to blame.

What it ends the worker with is SIGKILL: a process whose interpreter stands still obeys no other signal. Where
the worker is process 1 of a container, which the kernel lets nobody kill from inside, it is a signal whose
handler in C exits (`worker.stall_monitor`).
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

TYPE_CHECKING = False  # `typing` would be a fifth of what this process loads
if TYPE_CHECKING:
    import subprocess
    from typing import Any

LOOK_S = 0.25
IDLE_LOOK_S = 2.5  # while nobody works in the worker, which wakes us when somebody begins to
LOOK_NOW = b"!"
WAITING_HZ = 5  # a thread that waits for the interpreter looks 200 times a second, less where cores are short
SHORTEST_HELD_S = 1.0  # however short the lease is; as a loop that is dead (`time_limits`)
READY_BEFORE_S = 5.0  # before the end: what reports it needs a second to be loaded, several on a busy machine
DUMP_BEGINS_S, DUMP_PAUSES_S, DUMP_BYTES = 1.0, 0.2, 1_000_000
REPORT_S = 5.0  # for the report, beside the time for naming the run; the worker is stopped meanwhile
STOP_LOOKS, STOP_LOOK_S = 50, 0.01  # a thread that reads a page from a disk stops after that
BEATS = struct.Struct("=QdQQQ")  # as `HEAD` of `runtime.marks`
SLEEPS, STOPPED = frozenset(b"SI"), frozenset(b"Tt")

REPORTER = """\
import marshal, sys
sys.path[:] = marshal.load(sys.stdin.buffer)
from openagents_worker.worker.stall_report import main
main()
"""

Threads = dict[int, tuple[int, float]]
"""The state of each thread, a letter of proc(5), and the seconds of a core that it has used."""


def threads_of(pid: int) -> Threads:
    found, ticks = {}, os.sysconf("SC_CLK_TCK")
    for tid in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - `pathlib` is not small
        try:
            with open(f"/proc/{pid}/task/{tid}/stat", "rb") as file:  # noqa: PTH123 - as above
                text = file.read()
        except OSError:  # it has ended meanwhile
            continue
        fields = text[text.rindex(b")") + 2 :].split()  # the name before it may hold anything
        found[int(tid)] = fields[0][0], (int(fields[11]) + int(fields[12])) / ticks
    return found


def switches_of(pid: int) -> dict[int, int]:
    """How often each thread has gone to sleep so far."""
    found = {}
    for tid in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - as above
        try:
            with open(f"/proc/{pid}/task/{tid}/status", "rb") as file:  # noqa: PTH123 - as above
                found[int(tid)] = int(file.read().partition(b"\nvoluntary_ctxt_switches:")[2].split()[0])
        except (OSError, IndexError):  # it has ended meanwhile, or the system does not count
            continue
    return found


def stood_still_s(before: Threads, now: Threads, passed_s: float) -> float:
    """For how much of this time the process did not beat although it could."""
    states = {state for state, _ in now.values()}
    if states & STOPPED:
        return 0.0
    if states <= SLEEPS:
        return passed_s
    used_s = sum(max(used - before.get(tid, (0, used))[1], 0.0) for tid, (_, used) in now.items())
    return min(passed_s, used_s)


class Silence:
    """From a look at which the worker had not beaten since the one before, until it beats again."""

    def __init__(self, pid: int) -> None:
        self.held_s = 0.0
        self._pid = pid
        self._first = self._last = threads_of(pid)
        self._began_s = self._looked_s = time.monotonic()
        self._switches = switches_of(pid)

    def look(self) -> None:
        now_s, threads = time.monotonic(), threads_of(self._pid)
        # A longer pause is one in which this process, and probably the worker, did not run.
        self.held_s += stood_still_s(self._last, threads, min(now_s - self._looked_s, 2 * LOOK_S))
        self._last, self._looked_s = threads, now_s

    def waiting(self) -> list[int]:
        """The threads that wait for the interpreter."""
        least = WAITING_HZ * (time.monotonic() - self._began_s)
        now, before = switches_of(self._pid), self._switches
        return [tid for tid, count in now.items() if tid in before and count - before[tid] >= least]

    def used_s(self) -> dict[int, float]:
        """The seconds of a core that each thread has used in it."""
        return {
            tid: used - self._first[tid][1] for tid, (_, used) in self._last.items() if tid in self._first
        }


class Reporter:
    """The process that tells of the end: with the whole library, so it is started shortly before."""

    def __init__(self, path: list[str]) -> None:
        import subprocess  # only now: it is not small

        self._process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603 - our own arguments, no shell
            [sys.executable, "-c", REPORTER], stdin=subprocess.PIPE
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(marshal.dumps(path))
            self._process.stdin.flush()
        except OSError:  # it has ended already; its report will say so
            pass

    def report(self, told: dict[str, Any], within_s: float) -> bool:
        """Whether it has been told."""
        try:
            self._process.communicate(marshal.dumps(told), within_s)
            return self._process.returncode == 0
        except Exception:  # noqa: BLE001 - whatever it is, the worker's end is not held up by it
            return False
        finally:
            self.end()

    def end(self) -> None:
        self._process.kill()
        try:
            assert self._process.stdin is not None
            self._process.stdin.close()
        except OSError:  # it has ended before it had read all
            pass
        self._process.wait()


class GuardProcess:
    """Looks after the worker until it ends, or is ended. `told` is what `worker.stall_monitor` sends."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._told = told
        self._pid: int = told["pid"]
        self._memory = mmap.mmap(told["memory"], 0, prot=mmap.PROT_READ)
        os.close(told["memory"])
        self._beats = -1
        self._look_s = LOOK_S
        self._silence: Silence | None = None
        self._reporter: Reporter | None = None

    def run(self) -> None:
        while not self._worker_has_ended():
            try:
                if self._look() and self._end_worker():
                    return
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
        self._alive()

    def _worker_has_ended(self) -> bool:
        """Wait until it is time to look. Its end closes our stdin; a child of it may keep that open."""
        ready, _, _ = select.select([0], [], [], self._look_s)
        return bool(ready and not os.read(0, 64)) or os.getppid() != self._pid

    def _look(self) -> bool:
        """Whether the worker is to be ended."""
        beats, lease_end_s, _, _, is_idle = BEATS.unpack_from(self._memory)
        self._look_s = LOOK_S
        if beats != self._beats:
            self._beats = beats
            self._alive()
            if is_idle:
                self._look_s = IDLE_LOOK_S
            return False
        if beats == 0:
            return False
        if self._silence is None:
            self._silence = Silence(self._pid)
            return False
        self._silence.look()
        held_s, left_s = self._silence.held_s, self._left_s(lease_end_s)
        if self._reporter is None and left_s <= READY_BEFORE_S and held_s >= 2 * LOOK_S:
            self._reporter = self._new_reporter()
        return left_s <= 0

    def _left_s(self, lease_end_s: float) -> float:
        """Until the worker is to be ended, if it stands still so long: with its lease at the latest."""
        assert self._silence is not None
        held_s = self._silence.held_s
        left_s: float = self._told["loop_dead_s"] - held_s
        if lease_end_s:
            boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            left_s = min(left_s, max(lease_end_s - boot_s, SHORTEST_HELD_S - held_s))
        return left_s

    def _alive(self) -> None:
        self._silence = None
        if self._reporter is not None:
            self._reporter.end()
            self._reporter = None

    # --- the end -----------------------------------------------------------------------------------------

    def _end_worker(self) -> bool:
        """False: it has begun to beat again meanwhile."""
        silence = self._silence
        assert silence is not None
        waiting = silence.waiting()
        os.kill(self._pid, self._told["signal"])
        stacks = self._stacks()
        end_by = self._told["exit_signal"] or signal.SIGKILL
        self._stop_worker()
        try:
            if BEATS.unpack_from(self._memory)[0] != self._beats:
                os.kill(self._pid, signal.SIGCONT)
                self._alive()
                return False
            is_reported = self._report(
                {
                    "pid": self._pid,
                    "held_s": silence.held_s,
                    "exit_code": self._told["exit_signal"] or 128 + signal.SIGKILL,
                    "used_s": silence.used_s(),
                    "waiting": waiting,
                    "stacks": stacks.decode(errors="replace"),
                    "memory": bytes(self._memory),
                    **{name: self._told[name] for name in ("cell", "accuse_s", "log_is_json")},
                }
            )
        except BaseException:
            os.kill(self._pid, end_by)  # whatever has happened: never leave it stopped
            raise
        os.kill(self._pid, end_by)
        if not is_reported:
            _write_without_library(self._pid, silence.held_s, stacks)
        return True

    def _stop_worker(self) -> None:
        """Others may have its runs from now on: it must not go on. Process 1 cannot be stopped; it writes
        nothing that its fences do not let through, as nobody does who is late."""
        os.kill(self._pid, signal.SIGSTOP)
        for _ in range(STOP_LOOKS):
            if self._told["exit_signal"] or all(
                state in STOPPED for state, _ in threads_of(self._pid).values()
            ):
                return
            time.sleep(STOP_LOOK_S)

    def _stacks(self) -> bytes:
        """What `faulthandler` writes of each thread; its handler of the signal needs no interpreter."""
        found, wait_s, source = b"", DUMP_BEGINS_S, self._told["stacks"]
        while len(found) < DUMP_BYTES and select.select([source], [], [], wait_s)[0]:
            found += os.read(source, 65_536)
            wait_s = DUMP_PAUSES_S
        return found

    def _report(self, told: dict[str, Any]) -> bool:
        reporter = self._reporter or self._new_reporter()
        return reporter is not None and reporter.report(told, self._told["accuse_s"] + REPORT_S)

    def _new_reporter(self) -> Reporter | None:
        try:
            return Reporter(self._told["path"])
        except OSError:  # there is no memory for a process, or no place
            return None


def _write_without_library(pid: int, held_s: float, stacks: bytes) -> None:
    line = f"loop.dead pid={pid} silent_s={held_s:.1f} the interpreter of the worker stands still"
    os.write(2, f"{line}: it is ended\n".encode() + stacks + b"\n")


def main() -> None:
    for number in (
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):
        signal.signal(number, signal.SIG_IGN)  # they are the worker's, which may take its time to end
    with os.fdopen(0, "rb", closefd=False) as stdin:
        try:
            told = marshal.load(stdin)  # noqa: S302 - from the worker, whose child this is
        except EOFError:  # it has ended, or could not say what is to be done
            return
    GuardProcess(told).run()


if __name__ == "__main__":
    main()
