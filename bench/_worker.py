"""A worker process that is measured. The only place that starts one and reads its figures from the system."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import redis

PACKAGES = ("celery", "kombu", "redis", "hiredis", "greenlet", "uvloop")


def waiting_agent(wait_ms: int) -> Mapping[str, Any]:
    """An agent whose model answers after `wait_ms`."""
    return {
        "id": "waits",
        "name": "Waits",
        "llm": {"provider": "scripted", "script": [{"text": "done"}], "latency_ms": wait_ms},
        "memory": {"type": "buffer"},
        "pattern": {"type": "react", "config": {"step_timeout_ms": 2 * max(wait_ms, 30_000)}},
    }


class Worker:
    """A context manager that runs `celery -A APP worker`."""

    def __init__(
        self, folder: Path, url: str, agent: Mapping[str, Any], *arguments: str, app: str, **env: str
    ) -> None:
        file = folder / "agents.json"
        file.write_text(json.dumps({"agents": [agent]}))
        self._command = [sys.executable, "-m", "celery", "-A", app, "worker", "-l", "WARNING"]
        self._command += ["--without-gossip", "--without-mingle", "-n", f"{uuid.uuid4().hex[:6]}@bench"]
        self._command += arguments
        self._env = {**os.environ, "OPENAGENTS_REDIS_URL": url, "OPENAGENTS_CONFIG": str(file)}
        self._env |= {"OPENAGENTS_LOG_LEVEL": "WARNING", **env}
        self._url = url

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, env=self._env, stdout=subprocess.DEVNULL)
        with redis.Redis.from_url(self._url) as client:
            wait(lambda: client.zcard("oa:workers") or self._process.poll(), "the worker has registered")
        if self._process.poll() is not None:
            raise RuntimeError("the worker ended before it was ready")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        self._process.wait(60)

    def megabytes(self) -> float:
        """The memory of the worker process (PSS)."""
        return megabytes(self._process.pid)

    def cpu_s(self) -> float:
        """The CPU time of all live threads of the worker so far, in seconds."""
        return sum(_cpu_s_by_thread(self._process.pid).values())

    def cpu_s_by_thread(self) -> dict[int, float]:
        """The CPU time of each thread by its id, including the threads of child processes."""
        found = _cpu_s_by_thread(self._process.pid)
        for child in self.children():
            found |= _cpu_s_by_thread(child)
        return found

    def children(self) -> list[int]:
        """The ids of its child processes."""
        threads = Path(f"/proc/{self._process.pid}/task")
        return [int(pid) for one in threads.iterdir() for pid in (one / "children").read_text().split()]

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)


def _cpu_s_by_thread(pid: int) -> dict[int, float]:
    threads = Path(f"/proc/{pid}/task")
    return {int(one.name): int((one / "schedstat").read_text().split()[0]) / 1e9 for one in threads.iterdir()}


def megabytes(pid: int | str = "self") -> float:
    """The memory of a process. Shared pages count in proportion (PSS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def wait(condition: Callable[[], object], what: str, timeout_s: float = 120) -> None:
    """Wait until the condition is true. Raises `TimeoutError` with the text `what`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


def print_machine(url: str) -> None:
    """Print the machine, the versions, and the durability settings of Redis."""
    with redis.Redis.from_url(url) as client:
        server, durability = client.info("server"), client.config_get("append*")
    known = [f"{name} {found}" for name in PACKAGES if (found := _version(name))]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"load at the start: {os.getloadavg()[0]:.1f}")
    print(", ".join(known))
    print(
        f"Redis {server.get('valkey_version') or server['redis_version']}, "
        f"appendonly {durability['appendonly']}, appendfsync {durability['appendfsync']}",
        flush=True,
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
