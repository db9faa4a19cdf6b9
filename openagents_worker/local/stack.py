"""The stack. The only place that starts and stops a whole deployment on one machine: Redis, workers, Flower.

What the children print is handed on line by line under their names.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from openagents_worker.errors import OpenAgentsError
from openagents_worker.local.child_process import ChildProcess, free_port
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.producer.client import cell_of
from openagents_worker.settings import Settings, load_settings
from openagents_worker.store.client import Store

__all__ = ["Stack"]

STOP_MARGIN_S = 10.0  # beyond the drain
POLL_S = 0.05


class Stack:
    """A deployment for as long as the block lasts.

    >>> with Stack() as stack:
    ...     worker = stack.start_worker("w1")

    Without `redis_url` it starts a Redis of its own; with `data_dir` that one keeps its data there. `env` is
    what the children see besides the URLs; `say(name, line)` gets every line that they print, and without it
    the error of a child that does not start has its last lines. On Linux the
    children also end when the thread that started them does: start them in one that lives on.
    """

    def __init__(
        self,
        *,
        redis_url: str | None = None,
        data_dir: Path | None = None,
        env: Mapping[str, str] | None = None,
        say: Callable[[str, str], None] | None = None,
    ) -> None:
        self._env = dict(os.environ if env is None else env)
        self._given_url = redis_url
        self._redis = None if redis_url is not None else EmbeddedRedis(data_dir)
        self._say = say
        self._processes: list[ChildProcess] = []
        self._workers: list[ChildProcess] = []

    def __enter__(self) -> Self:
        if self._redis is not None:
            self._redis.start()
        self.set_env(OPENAGENTS_REDIS_URL=self.redis_url)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def redis_url(self) -> str:
        if self._redis is not None:
            return self._redis.url
        assert self._given_url is not None, "given, or started by us"
        return self._given_url

    @property
    def redis(self) -> EmbeddedRedis | None:
        """The Redis that was started, for who wants to stop it in between."""
        return self._redis

    @property
    def settings(self) -> Settings:
        """What the children read from their environment."""
        return load_settings(self._env)

    @property
    def workers(self) -> list[ChildProcess]:
        """The worker processes that were started, dead ones included."""
        return list(self._workers)

    def set_env(self, **variables: str) -> None:
        """What children that are started from now on see."""
        self._env |= variables

    def start_worker(self, name: str, *, concurrency: int | None = None) -> ChildProcess:
        """A worker process, registered in Redis."""
        limit = [] if concurrency is None else ["--concurrency", str(concurrency)]
        with contextlib.closing(Store(cell_of(self.settings), max_connections=1)) as store:
            before = _incarnations(store, name)  # of an earlier worker of this name
            worker = self._start(name, _ours("worker", "--name", name, *limit))
            self._workers.append(worker)
            worker.wait_until(lambda: bool(_incarnations(store, name) - before), "registered in Redis")
        return worker

    def start_flower(self, port: int = 0) -> str:
        """Flower, on this machine only; returns its address. Port 0: a free one."""
        port = port or free_port()
        url = f"http://127.0.0.1:{port}"
        flower = self._start("flower", _ours("flower", "--port", str(port)))
        flower.wait_until(lambda: _answers(f"{url}/healthcheck"), f"answers at {url}")
        return url

    def start_model_server(
        self, script: str, log: Path | None = None, *, latency_ms: int = 0, token_delay_ms: int = 0
    ) -> str:
        """The model server of `testing`, from a JSON file or `module:function`; returns its address."""
        command = [sys.executable, "-m", "openagents_worker.testing.model_server", "--script", script]
        command += ["--latency-ms", str(latency_ms), "--token-delay-ms", str(token_delay_ms)]
        command += ["--log", str(log)] if log is not None else []
        server = self._start("model", command)
        server.wait_until(lambda: bool(_urls(server.lines)), "says its address")
        return _urls(server.lines)[0]

    def wait(self) -> ChildProcess:
        """Wait until a child ends by itself, and say which."""
        while True:
            for process in self._processes:
                if process.exit_code is not None:
                    return process
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End everything: workers first, so that they can hand their runs over; Redis last."""
        within_s = self._drain_s() + STOP_MARGIN_S
        others = [process for process in self._processes if process not in self._workers]
        for group in (self._workers, others):
            for process in group:
                process.terminate()
            for process in group:
                process.stop(within_s)
        self._processes, self._workers = [], []
        if self._redis is not None:
            self._redis.stop()

    def _drain_s(self) -> float:
        try:
            return self.settings.drain_timeout_s
        except OpenAgentsError:
            return 0.0  # no child has got far with these settings

    def _start(self, name: str, command: Sequence[str]) -> ChildProcess:
        process = ChildProcess(name, command, {**self._env, "PYTHONUNBUFFERED": "1"}, self._say)
        self._processes.append(process)
        return process


def _ours(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "openagents_worker.cli", *arguments]


def _incarnations(store: Store, name: str) -> set[str]:
    everyone: list[str] = store.ask(lambda r: r.zrange(store.keys("workers"), 0, -1))
    return {incarnation for incarnation in everyone if incarnation.startswith(f"{name}@")}


def _urls(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.startswith("http://")]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):  # noqa: S310 - http to this machine
            return True
    except OSError:
        return False
