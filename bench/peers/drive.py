"""The process of an adapter. The only place that talks to adapters and stops everything that they started."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from bench.peers.environments import ADAPTERS, ROOT, cache, python_of
from bench.peers.systems import JOBS, System
from openagents_worker.local.redis_server import find_server

__all__ = ["Adapter", "Failed", "NotMeasured", "adopt_orphans", "end_orphans"]

STOP_TIMEOUT_S = 45.0
CHECK_INTERVAL_S = 0.5  # between two checks whether an adapter is still alive
PR_SET_CHILD_SUBREAPER = 36


class Failed(Exception):
    """The measurement of a system failed. The text is the reason."""


class NotMeasured(Exception):
    """This machine lacks something that the measurement needs. The text says what."""


class Adapter:
    """A context manager that runs the adapter of one system, in a new folder."""

    living: set[int] = set()  # noqa: RUF012 - the process ids of all adapters

    def __init__(self, system: System) -> None:
        self._system = system

    def __enter__(self) -> Self:
        python = python_of(self._system.adapter) if self._system.own_environment else Path(sys.executable)
        runs = cache() / "runs" / str(os.getpid())
        runs.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self._system.name}-", dir=runs))
        self._folder.chmod(0o755)  # PostgreSQL runs as another user when we are root
        script = ADAPTERS / f"{self._system.adapter}_peer.py"
        options = json.dumps({**self._system.options, "jobs": JOBS})
        self._errors = self._folder / "adapter.err"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python), str(script), "serve", str(self._folder), options],
                env=self._environment(),
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        Adapter.living.add(self._process.pid)
        return self

    def __exit__(self, *_: object) -> None:
        """Let the adapter stop its servers. Then kill everything that is left of it and remove its folder."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        Adapter.living.discard(self._process.pid)
        end_orphans()
        shutil.rmtree(self._folder, ignore_errors=True)

    def ask(self, do: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its answer. Raises `Failed` or `NotMeasured`."""
        self.send(do, **arguments)
        return self.answer(timeout_s)

    def send(self, do: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer. Raises `Failed`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps({"do": do, **arguments}) + "\n").encode())
            self._process.stdin.flush()
        except OSError:
            raise Failed(f"the adapter has ended: {self._last_words()}") from None

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the answer to the last command. Raises `Failed` or `NotMeasured`."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while not select.select([self._process.stdout], [], [], CHECK_INTERVAL_S)[0]:
            if self._process.poll() is not None:  # its children may still hold the pipe open
                raise Failed(f"the adapter has ended: {self._last_words()}")
            if time.monotonic() > deadline:
                raise Failed(f"no answer within {timeout_s:.0f} s: {self._last_words()}")
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"the adapter has ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "not_measured" in answer:
            raise NotMeasured(answer["not_measured"])
        if "failed" in answer:
            raise Failed(answer["failed"])
        found: dict[str, Any] = answer["ok"]
        return found

    def _environment(self) -> Mapping[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENAGENTS_")}
        kept["PEER_REDIS_SERVER"] = str(find_server())
        if not self._system.own_environment:
            kept["PYTHONPATH"] = str(ROOT)
        return kept

    def _last_words(self) -> str:
        return self._errors.read_text(errors="replace").strip()[-300:]


def adopt_orphans() -> None:
    """Make this process the parent of the children of dead adapters (Linux), so that it can kill them.

    Also removes the folders of killed benchmarks.
    """
    for left in (cache() / "runs").glob("[0-9]*"):
        if not Path("/proc", left.name).exists():
            shutil.rmtree(left, ignore_errors=True)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_orphans() -> None:
    """Kill every child of this process that is not an adapter: the processes that adapters left behind."""
    for _ in range(100):  # the children of a killed orphan become children of this process
        left = _children() - Adapter.living
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        time.sleep(0.01)


def _children() -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(stat.parent.name))
    return found
