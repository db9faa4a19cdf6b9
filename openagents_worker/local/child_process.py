"""Child processes. The only place that starts a process that ends with its parent."""

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

__all__ = ["ChildProcess", "die_with_parent", "end_with_parent", "free_port", "port_or_free"]

# A worker starts in one or two seconds, on a very busy machine in thirty.
READY_TIMEOUT_S = 60.0
POLL_S = 0.05
TAIL_LINES = 15

# A child must end with the process that started it, also if that process is killed. Linux sends a signal to
# a child when its parent dies, if the child has requested it (PR_SET_PDEATHSIG = 1). `preexec_fn` cannot do
# this, because Python code between fork and exec can deadlock in a process with threads. Therefore a new
# interpreter requests the signal, checks that its parent is still alive, and executes the child under the
# same process id.
_DIE_WITH_PARENT = """
import ctypes, os, sys
parent, child = int(sys.argv[1]), sys.argv[2:]
ctypes.CDLL(None, use_errno=True).prctl(1, 15, 0, 0, 0)
if os.getppid() != parent:
    sys.exit("the parent process is gone")
os.execv(child[0], child)
"""


def end_with_parent(command: Sequence[str]) -> list[str]:
    """The command for a child that ends when the thread that started it ends. Other systems than Linux: no
    change."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


def die_with_parent() -> None:
    """Ask the Linux kernel to end this process with its parent, also if the parent is killed.

    Raises `ConfigError` on other systems.
    """
    if sys.platform != "linux":
        raise ConfigError("only Linux can end a process together with its parent")
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent or parent == 1:  # the parent died before the request
        sys.exit(1)


PR_SET_PDEATHSIG = 1  # of prctl(2)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is not in use now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def port_or_free(wanted: int) -> int:
    """This TCP port of 127.0.0.1, or another one if it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return free_port()
    return wanted


class ChildProcess:
    """A child process in its own process group, and its output. Only this group is ever signalled.

    `on_line(name, line)` gets each line that it prints. `env` None: the environment of this process. `kind`
    is what messages call it, such as "worker".
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str, str], None] | None = None,
        *,
        kind: str = "process",
    ) -> None:
        self.name = name
        self.kind = kind
        self._on_line = on_line
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._popen = subprocess.Popen(  # noqa: S603 - our own arguments, and no shell
            end_with_parent(command),
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in a terminal signals only the parent
        )
        self._reader = threading.Thread(target=self._read, name=f"output of {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while the process is running. A negative code is the signal that ended it."""
        return self._popen.poll()

    @property
    def lines(self) -> list[str]:
        """The last 15 lines of its output."""
        return list(self._tail)

    def terminate(self) -> None:
        """Send SIGTERM to the process, and return at once."""
        if self.exit_code is None:
            self._popen.terminate()

    def kill(self) -> None:
        """Kill the process and its children with SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        self._close_output()

    def stop(self, timeout_s: float, ask: Callable[[], object] | None = None) -> int:
        """Ask the process to stop, wait up to `timeout_s`, then kill its group. Returns the exit code.

        It is asked with SIGTERM, or with `ask()` first and with SIGTERM when half of the time is over.
        """
        if ask is not None and self.exit_code is None:
            ask()
            self._wait(timeout_s / 2)
            timeout_s /= 2
        self.terminate()
        self._wait(timeout_s)
        self.kill()
        return self._popen.returncode

    def _wait(self, timeout_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout_s)

    def wait_until(
        self,
        ready: Callable[[], bool],
        what: str,
        timeout_s: float = READY_TIMEOUT_S,
        poll_s: float = POLL_S,
    ) -> None:
        """Wait until `ready()` is true. `what` describes the condition.

        Raises `ConfigError` with the last output, if the process ends or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self.exit_code is not None:
                self._reader.join()
                raise ConfigError(
                    f"the {self.kind} {self.name} ended with code {self.exit_code}", hint=self._last_output()
                )
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"the {self.kind} {self.name} did not reach this within {timeout_s:.0f} s: {what}",
                    hint=self._last_output(),
                )
            time.sleep(poll_s)

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            self._tail.append(line.rstrip("\n"))
            if self._on_line is not None:
                self._on_line(self.name, line.rstrip("\n"))

    def _last_output(self) -> str | None:
        """The last lines of output; None if `on_line` already got them."""
        return "\n  ".join(self._tail) if self._on_line is None else None

    def _close_output(self) -> None:
        """Read the rest of the output, and close the pipe."""
        self._reader.join()
        assert self._popen.stdout is not None
        self._popen.stdout.close()
