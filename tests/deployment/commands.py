"""Commands of a deployment, executed here. The only place that starts one and ends all it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
MARK = "DEPLOYMENT_TEST"
ENDS_WITHIN_S = 30


def environment(redis_url: str, **more: str) -> dict[str, str]:
    """What a container's environment would say, and where this virtual environment's programs are."""
    programs = str(Path(sys.executable).parent)
    return {
        "PATH": os.pathsep.join([programs, os.environ["PATH"]]),
        "HOME": os.environ.get("HOME", "/"),
        "HOSTNAME": socket.gethostname(),  # a container's shell has it; others only know it
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "OPENAGENTS_REDIS_URL": redis_url,
        **more,
    }


@dataclass
class Running:
    """A command that runs, with all that it has started."""

    process: subprocess.Popen[bytes]
    log: Path
    mark: str = field(repr=False)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def terminate(self) -> int:
        """Ask it to end, as Docker and systemd do; its exit code."""
        self.process.terminate()
        return self.process.wait(ENDS_WITHIN_S)

    def left(self) -> list[int]:
        """The processes that still run: it, and what it has started.

        The kernel shows no environment of a process that is just starting, so the process itself is asked.
        """
        started = [self.process.pid] if self.process.poll() is None else []
        return sorted({*started, *marked(self.mark)})


@contextmanager
def running(
    command: Sequence[str], env: Mapping[str, str], folder: Path, *, cwd: Path = ROOT
) -> Generator[Running]:
    """A command for as long as the block lasts, in the project's folder; `folder` gets its log."""
    mark = uuid.uuid4().hex
    log = folder / f"{Path(command[0]).name}-{mark[:8]}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**env, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Running(process, log, mark)
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.terminate()
                process.wait(ENDS_WITHIN_S)
            for pid in marked(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def marked(mark: str) -> list[int]:
    """The living processes that have this mark in their environment, wherever they hang in the tree."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended, or is somebody else's
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
