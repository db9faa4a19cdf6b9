"""Neighbours. The only place that says whether another process of this host is alive.

A worker registers its host, process id and start time. On the same host a death is then known exactly: the
process is gone, is a zombie, or its id belongs to another process. Looking costs no command to Redis: a pidfd
reports a death at once, and where there is none `/proc` is read four times a second.
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

from openagents_worker.worker.background import Leave, background_thread

__all__ = ["LocalProcessWatch", "ProcessIdentity", "Sign", "sign_of", "this_process"]

PROC = Path("/proc")
LOOK_EVERY_S = 0.25  # where no pidfd reports the death
_PIDFD_OPEN: Callable[[int], int] | None = getattr(os, "pidfd_open", None)


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process of one boot of a host. Its id may be used again, but not with the same start time."""

    host: str
    """The boot and the name spaces in which process ids and start times mean what they mean to us."""
    process: str
    """As it is registered: `{pid} {start time in ticks since the boot}`."""


class Sign(StrEnum):
    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"  # it may not be looked at: only its lease can tell


def this_process(proc: Path = PROC) -> ProcessIdentity | None:
    """This process, as its neighbours will look for it; None where the system does not say."""
    try:
        # /proc of another name space shows other processes under the same ids.
        if int((proc / "self").readlink().name) != os.getpid():
            return None
        boot_id = (proc / "sys/kernel/random/boot_id").read_text().strip()
        spaces = [(proc / "self/ns/pid").readlink().name]
        if (
            proc / "self/ns/time"
        ).is_symlink():  # start times are shown as the reader's name space counts them
            spaces.append((proc / "self/ns/time").readlink().name)
        started = _Stat.of(os.getpid(), proc).started
    except (OSError, ValueError, IndexError):
        return None
    return ProcessIdentity(" ".join([boot_id, *spaces]), f"{os.getpid()} {started}")


def sign_of(process: str, proc: Path = PROC) -> Sign:
    """Whether this process of this host lives. DEAD is certain; `proc` that hides it proves nothing."""
    try:
        pid, started = (int(part) for part in process.split())
        stat = _Stat.of(pid, proc)
    except (FileNotFoundError, ProcessLookupError):
        return Sign.UNKNOWN if _exists(pid) else Sign.DEAD  # mounted with `hidepid`, it hides other users'
    except (OSError, ValueError, IndexError):
        return Sign.UNKNOWN
    return Sign.DEAD if stat.started != started or stat.is_zombie else Sign.ALIVE


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it is somebody else's
    return True


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    threads: int
    started: int

    @classmethod
    def of(cls, pid: int, proc: Path) -> _Stat:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
        fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything; see proc(5)
        return cls(fields[0], int(fields[17]), int(fields[19]))

    @property
    def is_zombie(self) -> bool:
        """Dead and not reaped. A first thread that has ended before the others looks like it, and is not."""
        return self.state in ("Z", "X") and self.threads <= 1


class LocalProcessWatch:
    """Watches the processes of this host's other workers, in a thread that never speaks to Redis.

    `on_dead` is called in that thread with those that have died, by incarnation.
    """

    def __init__(
        self,
        own: ProcessIdentity,
        *,
        on_dead: Callable[[Mapping[str, ProcessIdentity]], None],
        look_every_s: float = LOOK_EVERY_S,
        leave: Leave = os._exit,
        sign: Callable[[str], Sign] = sign_of,
        open_pidfd: Callable[[int], int] | None = _PIDFD_OPEN,
    ) -> None:
        self._own = own
        self._on_dead = on_dead
        self._look_every_s = look_every_s
        self._sign = sign
        self._open_pidfd = open_pidfd
        self._lock = threading.Lock()
        self._wanted: dict[str, str] = {}
        self._pidfds: dict[str, int | None] = {}
        self._changed = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self._thread = background_thread(self._main, name="openagents-neighbours", leave=leave)

    def start(self) -> None:
        self._thread.start()

    def watch(self, neighbours: Mapping[str, str]) -> None:
        """Watch these and no others from now on, as Redis knows them: incarnation -> process."""
        with self._lock:
            wanted = {
                incarnation: process
                for incarnation, process in neighbours.items()
                if process != self._own.process
            }
            if self._stopping or wanted == self._wanted:
                return
            self._wanted = wanted
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
            ended = self._wait()
            with self._lock:
                wanted = dict(self._wanted)
            ended |= self._begin(wanted)
            dead = {
                incarnation: ProcessIdentity(self._own.host, process)
                for incarnation, process in wanted.items()
                if incarnation in ended or self._is_seen_dead(incarnation, process)
            }
            for incarnation in dead:
                self._forget(incarnation)
            if dead:
                with self._lock:
                    self._wanted = {name: p for name, p in self._wanted.items() if name not in dead}
                self._on_dead(dead)

    def _begin(self, wanted: Mapping[str, str]) -> set[str]:
        """Watch what is new, and no longer what is not wanted; returns what is dead already."""
        for incarnation in self._pidfds.keys() - wanted.keys():
            self._forget(incarnation)
        dead = set()
        for incarnation in wanted.keys() - self._pidfds.keys():
            # The pidfd first: a process that then has the right start time is the one that it was opened for.
            pidfd = self._pidfd(wanted[incarnation])
            match self._sign(wanted[incarnation]):
                case Sign.ALIVE:
                    self._pidfds[incarnation] = pidfd
                case Sign.UNKNOWN:
                    self._pidfds[incarnation] = None
                    _close(pidfd)
                case Sign.DEAD:
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
        except (OSError, ValueError):  # it is gone, or the system does not allow it
            return None

    def _is_seen_dead(self, incarnation: str, process: str) -> bool:
        """By a look at `/proc`, where no pidfd tells."""
        return (
            incarnation in self._pidfds
            and self._pidfds[incarnation] is None
            and self._sign(process) is Sign.DEAD
        )

    def _wait(self) -> set[str]:
        """Wait until a neighbour ends, others are to be watched, or it is time to look; returns who ended."""
        poll = select.poll()
        poll.register(self._changed, select.POLLIN)
        by_pidfd = {pidfd: name for name, pidfd in self._pidfds.items() if pidfd is not None}
        for pidfd in by_pidfd:
            poll.register(pidfd, select.POLLIN)
        has_all = len(by_pidfd) == len(self._pidfds)
        ready = {fd for fd, _ in poll.poll(None if has_all else self._look_every_s * 1000)}
        if self._changed in ready:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._changed)
        return {name for pidfd, name in by_pidfd.items() if pidfd in ready}

    def _forget(self, incarnation: str) -> None:
        _close(self._pidfds.pop(incarnation, None))


def _close(pidfd: int | None) -> None:
    if pidfd is not None:
        os.close(pidfd)
