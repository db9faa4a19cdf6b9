"""Child processes. The only place that starts a process which must not outlive its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from openagents_worker.errors import ConfigError

__all__ = ["ChildProcess", "die_with_parent", "end_with_parent", "free_port"]

# A worker is up in a second or two, on a busy machine in ten, on a very busy one in thirty.
READY_TIMEOUT_S = 60.0
POLL_S = 0.05
TAIL_LINES = 15

# A child must not outlive the process that started it, however that ends. Linux tells a child of its
# parent's death (PR_SET_PDEATHSIG = 1), but the child has to ask for it. Asking in `preexec_fn` runs Python
# between fork and exec, which can deadlock in a process with threads; so a fresh interpreter asks, looks
# whether its parent has died meanwhile, and becomes the child, under the same process id.
_DIE_WITH_PARENT = """
import ctypes, os, sys
parent, child = int(sys.argv[1]), sys.argv[2:]
ctypes.CDLL(None, use_errno=True).prctl(1, 15, 0, 0, 0)
if os.getppid() != parent:
    sys.exit("the parent process is gone")
os.execv(child[0], child)
"""


def end_with_parent(command: Sequence[str]) -> list[str]:
    """The command of a child that ends when the thread that starts it does; only on Linux."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def die_with_parent() -> None:
    """Ask the kernel to end this process with its parent, also when the parent is killed; only on Linux.

    Raises `ConfigError` elsewhere.
    """
    if sys.platform != "linux":
        raise ConfigError("a process can end with its parent on Linux only")
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent or parent == 1:  # it died before the kernel knew
        sys.exit(1)


PR_SET_PDEATHSIG = 1  # of prctl(2)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ChildProcess:
    """A child in a process group of its own, and what it prints. Nothing else is ever signalled."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        say: Callable[[str, str], None] | None,
    ) -> None:
        self.name = name
        self._say = say
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._popen = subprocess.Popen(  # noqa: S603 - our own arguments, and no shell
            end_with_parent(command),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C at a terminal is for us; children are told afterwards
        )
        self._reader = threading.Thread(target=self._read, name=f"output of {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._popen.poll()

    @property
    def lines(self) -> list[str]:
        """The last lines it has printed."""
        return list(self._tail)

    def terminate(self) -> None:
        """Ask it to end; returns at once."""
        if self.exit_code is None:
            self._popen.terminate()

    def kill(self) -> None:
        """End it and all that it has started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        self._finish()

    def stop(self, timeout_s: float) -> int:
        """Ask it to end, wait, then leave nothing of its group; returns its exit code."""
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout_s)
        self.kill()
        return self._popen.returncode

    def wait_until(self, ready: Callable[[], bool], what: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait for a condition while the child lives. Raises `ConfigError` with its last words."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self.exit_code is not None:
                self._reader.join()
                raise ConfigError(f"{self.name} ended with code {self.exit_code}", hint=self._last_words())
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{self.name}: {what}: not within {timeout_s:.0f} s", hint=self._last_words()
                )
            time.sleep(POLL_S)

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self._tail.append(line.rstrip("\n"))
            if self._say is not None:
                self._say(self.name, line.rstrip("\n"))

    def _last_words(self) -> str | None:
        """What it printed, unless that was shown as it came."""
        return "\n  ".join(self._tail) if self._say is None else None

    def _finish(self) -> None:
        self._reader.join()
        assert self._popen.stdout is not None
        self._popen.stdout.close()
