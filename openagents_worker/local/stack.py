"""The development stack. The only place that starts and stops a deployment on one machine: Redis, workers,
Flower.

The output of the child processes is passed on line by line.
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

STOP_MARGIN_S = 10.0  # added to the drain timeout
POLL_S = 0.05


class Stack:
    """A deployment that exists during a `with` block.

    >>> with Stack() as stack:
    ...     worker = stack.start_worker("w1")

    Without `redis_url` it starts an embedded Redis, which stores its data in `data_dir`, if it is given, and
    listens on `redis_port`, by default on a free one.
    `env` is the environment of the child processes, without the URLs. `say(name, line)` gets every line that
    they print. Without `say`, the error of a child that does not start contains its last lines. On Linux the
    children also end when the thread that started them ends.
    """

    def __init__(
        self,
        *,
        redis_url: str | None = None,
        data_dir: Path | None = None,
        redis_port: int | None = None,
        env: Mapping[str, str] | None = None,
        say: Callable[[str, str], None] | None = None,
    ) -> None:
        self._env = dict(os.environ if env is None else env)
        self._given_url = redis_url
        self._redis = None if redis_url is not None else EmbeddedRedis(data_dir, redis_port)
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
        assert self._given_url is not None, "without a given URL there is an embedded Redis"
        return self._given_url

    @property
    def redis(self) -> EmbeddedRedis | None:
        """The embedded Redis, for example to stop it for a test; None with a given URL."""
        return self._redis

    @property
    def settings(self) -> Settings:
        """The settings of the child processes."""
        return load_settings(self._env)

    @property
    def workers(self) -> list[ChildProcess]:
        """All worker processes that were started, including dead ones."""
        return list(self._workers)

    def set_env(self, **variables: str) -> None:
        """Set environment variables for child processes that are started later."""
        self._env |= variables

    def start_worker(self, name: str, *, concurrency: int | None = None) -> ChildProcess:
        """Start a worker process and wait until it is registered in Redis."""
        limit = [] if concurrency is None else ["--concurrency", str(concurrency)]
        with contextlib.closing(Store(cell_of(self.settings), max_connections=1)) as store:
            before = _incarnations(store, name)  # of earlier workers with this name
            worker = self._start(name, _cli_command("worker", "--name", name, *limit), kind="worker")
            self._workers.append(worker)
            worker.wait_until(lambda: bool(_incarnations(store, name) - before), "registered in Redis")
        return worker

    def replace_worker(self, old: ChildProcess, *, concurrency: int | None = None) -> ChildProcess:
        """Start a worker with the same name, then stop the old one, which hands over its runs.

        Raises `ConfigError` if the new one does not start; then the old one goes on.
        """
        count = len(self._processes)
        try:
            new = self.start_worker(old.name, concurrency=concurrency)
        except OpenAgentsError:
            for failed in self._processes[count:]:
                failed.kill()
                self._forget(failed)
            raise
        old.stop(self._drain_s() + STOP_MARGIN_S)
        self._forget(old)
        return new

    def start_flower(self, port: int = 0) -> str:
        """Start Flower on 127.0.0.1, and return its URL. Port 0: a free port."""
        port = port or free_port()
        url = f"http://127.0.0.1:{port}"
        flower = self._start("flower", _cli_command("flower", "--port", str(port)))
        flower.wait_until(lambda: _is_answering(f"{url}/healthcheck"), f"answers at {url}")
        return url

    def start_model_server(
        self, script: str, log: Path | None = None, *, latency_ms: int = 0, token_delay_ms: int = 0
    ) -> str:
        """Start the model server of `testing`, and return its URL. `script` is a JSON file or
        `module:function`."""
        command = [sys.executable, "-m", "openagents_worker.testing.model_server", "--script", script]
        command += ["--latency-ms", str(latency_ms), "--token-delay-ms", str(token_delay_ms)]
        command += ["--log", str(log)] if log is not None else []
        server = self._start("model", command)
        server.wait_until(lambda: bool(_urls(server.lines)), "prints its URL")
        return _urls(server.lines)[0]

    def ended(self) -> ChildProcess | None:
        """A child process that has ended, the embedded Redis included, or None."""
        redis = [] if self._redis is None else [self._redis.process]
        return next((child for child in (*redis, *self._processes) if child.exit_code is not None), None)

    def wait(self) -> ChildProcess:
        """Wait until a child process ends, and return it."""
        while (process := self.ended()) is None:
            time.sleep(POLL_S)
        return process

    def stop(self) -> None:
        """Stop all processes: the workers first, so that they can hand over their runs, and Redis last."""
        timeout_s = self._drain_s() + STOP_MARGIN_S
        others = [process for process in self._processes if process not in self._workers]
        for group in (self._workers, others):
            for process in group:
                process.terminate()
            for process in group:
                process.stop(timeout_s)
        self._processes, self._workers = [], []
        if self._redis is not None:
            self._redis.stop()

    def _drain_s(self) -> float:
        try:
            return self.settings.drain_timeout_s
        except OpenAgentsError:
            return 0.0  # no child can work with invalid settings

    def _forget(self, process: ChildProcess) -> None:
        self._processes.remove(process)
        if process in self._workers:
            self._workers.remove(process)

    def _start(self, name: str, command: Sequence[str], kind: str = "process") -> ChildProcess:
        env = {**self._env, "PYTHONUNBUFFERED": "1"}
        process = ChildProcess(name, command, env, self._say, kind=kind)
        self._processes.append(process)
        return process


def _cli_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "openagents_worker.cli", *arguments]


def _incarnations(store: Store, name: str) -> set[str]:
    incarnations: list[str] = store.ask(lambda r: r.zrange(store.keys("workers"), 0, -1))
    return {incarnation for incarnation in incarnations if incarnation.startswith(f"{name}@")}


def _urls(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.startswith("http://")]


def _is_answering(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):  # noqa: S310 - http to this machine
            return True
    except OSError:
        return False
