"""Local processes: the only place that checks whether another process of this host is alive.

A worker registers its host, process id and start time, so that the other workers of the host detect its death
exactly: the process is gone, is a zombie, or its id belongs to another process. No check costs a command to
Redis. A pidfd reports a death at once; without pidfds `/proc` is read four times a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import assert_never

from openagents_worker.worker.background import Health, Leave, background_thread

__all__ = ["LocalProcessWatch", "ProcessIdentity", "ProcessState", "process_state", "this_process"]

PROC = Path("/proc")
CHECK_EVERY_S = 0.25  # without pidfds
_PIDFD_OPEN: Callable[[int], int] | None = getattr(os, "pidfd_open", None)


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """Identifies one process on one host since its boot. Process ids are reused, so it has the start time."""

    host: str
    """The boot id and the namespaces in which process ids and start times can be compared."""
    process: str
    """As registered in Redis: `{pid} {start time in ticks since boot}`."""


class ProcessState(StrEnum):
    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"  # the system hides it: only its lease shows it


def this_process(proc: Path = PROC) -> ProcessIdentity | None:
    """The identity of this process; None if the system does not provide it."""
    try:
        # /proc of another namespace shows other processes under the same ids.
        if int((proc / "self").readlink().name) != os.getpid():
            return None
        boot_id = (proc / "sys/kernel/random/boot_id").read_text().strip()
        namespaces = [(proc / "self/ns/pid").readlink().name]
        # Start times are shown in the time namespace of the reader.
        if (proc / "self/ns/time").is_symlink():
            namespaces.append((proc / "self/ns/time").readlink().name)
        started = _Stat.of(os.getpid(), proc).started
    except (OSError, ValueError, IndexError):
        return None
    return ProcessIdentity(" ".join([boot_id, *namespaces]), f"{os.getpid()} {started}")


def process_state(process: str, proc: Path = PROC) -> ProcessState:
    """The state of a process of this host. DEAD is certain; a `/proc` that hides it gives UNKNOWN."""
    try:
        pid, started = (int(part) for part in process.split())
        stat = _Stat.of(pid, proc)
    except (FileNotFoundError, ProcessLookupError):
        return (
            ProcessState.UNKNOWN if _exists(pid) else ProcessState.DEAD
        )  # `/proc` mounted with `hidepid` hides processes of other users
    except (OSError, ValueError, IndexError):
        return ProcessState.UNKNOWN
    return ProcessState.DEAD if stat.started != started or stat.is_zombie else ProcessState.ALIVE


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # the process of another user
    return True


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    threads: int
    started: int

    @classmethod
    def of(cls, pid: int, proc: Path) -> _Stat:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
        fields = text[
            text.rindex(")") + 2 :
        ].split()  # the name before it may contain any character; see proc(5)
        return cls(fields[0], int(fields[17]), int(fields[19]))

    @property
    def is_zombie(self) -> bool:
        """Dead and not reaped. A main thread that has ended before other threads looks the same but is
        not."""
        return self.state in ("Z", "X") and self.threads <= 1


class LocalProcessWatch:
    """Watches the processes of the other workers of this host, in a thread that makes no call to Redis.

    `on_dead` is called in that thread with the processes that have died, by incarnation.
    """

    name = "local processes"

    def __init__(
        self,
        own: ProcessIdentity,
        *,
        on_dead: Callable[[Mapping[str, ProcessIdentity]], None],
        check_every_s: float = CHECK_EVERY_S,
        leave: Leave = os._exit,
        state_of: Callable[[str], ProcessState] = process_state,
        open_pidfd: Callable[[int], int] | None = _PIDFD_OPEN,
    ) -> None:
        self._own = own
        self._on_dead = on_dead
        self._check_every_s = check_every_s
        self._state_of = state_of
        self._open_pidfd = open_pidfd
        self._lock = threading.Lock()
        self._watched: dict[str, str] = {}
        self._pidfds: dict[str, int | None] = {}
        self._changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._thread = background_thread(self._main, name="openagents-local-processes", leave=leave)
        self.health = Health()

    def start(self) -> None:
        self._thread.start()

    def watch(self, workers: Mapping[str, str]) -> None:
        """Watch exactly these workers from now on. `workers`: incarnation -> process as registered."""
        with self._lock:
            watched = {
                incarnation: process
                for incarnation, process in workers.items()
                if process != self._own.process
            }
            if self._stopping or watched == self._watched:
                return
            self._watched = watched
            os.eventfd_write(self._changed, 1)

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            os.eventfd_write(self._changed, 1)
        if self._thread.ident is not None:
            self._thread.join()
        for incarnation in list(self._pidfds):
            self._forget(incarnation)
        os.close(self._changed)

    # --- in the thread ---

    def _main(self) -> None:
        while not self._stopping:
            exited = self._wait()
            with self._lock:
                watched = dict(self._watched)
            exited |= self._update_pidfds(watched)
            dead = {
                incarnation: ProcessIdentity(self._own.host, process)
                for incarnation, process in watched.items()
                if incarnation in exited or self._is_dead_by_proc(incarnation, process)
            }
            for incarnation in dead:
                self._forget(incarnation)
            if dead:
                with self._lock:
                    self._watched = {name: p for name, p in self._watched.items() if name not in dead}
                self._on_dead(dead)
            self.health.succeeded()

    def _update_pidfds(self, watched: Mapping[str, str]) -> set[str]:
        """Open pidfds for new processes and close those of others; returns the incarnations already dead."""
        for incarnation in self._pidfds.keys() - watched.keys():
            self._forget(incarnation)
        dead = set()
        for incarnation in watched.keys() - self._pidfds.keys():
            # Open the pidfd before the check: if the start time is right then, the pidfd is of the right
            # process.
            pidfd = self._pidfd(watched[incarnation])
            match self._state_of(watched[incarnation]):
                case ProcessState.ALIVE:
                    self._pidfds[incarnation] = pidfd
                case ProcessState.UNKNOWN:
                    self._pidfds[incarnation] = None
                    _close(pidfd)
                case ProcessState.DEAD:
                    dead.add(incarnation)
                    _close(pidfd)
                case never:
                    assert_never(never)
        return dead

    def _pidfd(self, process: str) -> int | None:
        if self._open_pidfd is None:
            return None
        try:
            return self._open_pidfd(int(process.split()[0]))
        except (OSError, ValueError):  # the process is gone, or the system does not allow it
            return None

    def _is_dead_by_proc(self, incarnation: str, process: str) -> bool:
        """Whether `/proc` shows the process as dead; only for processes without a pidfd."""
        return (
            incarnation in self._pidfds
            and self._pidfds[incarnation] is None
            and self._state_of(process) is ProcessState.DEAD
        )

    def _wait(self) -> set[str]:
        """Wait until a process exits, the watched set changes, or the next `/proc` check is due.

        Returns the incarnations of the processes that have exited.
        """
        poll = select.poll()
        poll.register(self._changed, select.POLLIN)
        by_pidfd = {pidfd: name for name, pidfd in self._pidfds.items() if pidfd is not None}
        for pidfd in by_pidfd:
            poll.register(pidfd, select.POLLIN)
        has_all = len(by_pidfd) == len(self._pidfds)
        ready = {fd for fd, _ in poll.poll(None if has_all else self._check_every_s * 1000)}
        if self._changed in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._changed)
        return {name for pidfd, name in by_pidfd.items() if pidfd in ready}

    def _forget(self, incarnation: str) -> None:
        _close(self._pidfds.pop(incarnation, None))


def _close(pidfd: int | None) -> None:
    if pidfd is not None:
        os.close(pidfd)
