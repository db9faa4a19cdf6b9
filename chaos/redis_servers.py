"""The Redis of a deployment: one server with an append-only file, or a master and a replica with Sentinel."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, Self, TypeVar

import redis
from redis import ResponseError

from chaos.failovers import FailoverWatch
from openagents_worker.errors import RedisUnreachable
from openagents_worker.local.child_process import free_port
from openagents_worker.local.redis_server import EmbeddedRedis
from tests.sentinel.watched import PASSWORD, Watched

__all__ = ["AppendFsync", "RedisWithSentinel", "SingleRedis"]

T = TypeVar("T")

AppendFsync = Literal["everysec", "always"]
FAILED_SNAPSHOT = "unwritable.rdb"
"""The name of a directory in Redis's folder. A snapshot with this name always fails."""
DOWN_AFTER_MS = 4_000  # so that sentinels do not replace a master that is only slow on a busy machine
MOST_LAG_S = 1  # since the replica has confirmed what it has; it does that once a second
START_PATIENCE_S = 120.0
SAVE_ONCE_AN_HOUR = "3600 1"


class Starter:
    """Starts processes from one thread, because Linux ends a child with the thread that started it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="starter")

    def run(self, start: Callable[[], T]) -> T:
        return self._thread.submit(start).result()

    def close(self) -> None:
        self._thread.shutdown()


class SingleRedis:
    """One Redis with an append-only file. It keeps its port when it is started again."""

    def __init__(self, folder: Path, starter: Starter, appendfsync: AppendFsync) -> None:
        self.port = free_port()
        self._folder = folder
        self._starter = starter
        self._appendfsync = appendfsync

    def __enter__(self) -> Self:
        (self._folder / FAILED_SNAPSHOT).mkdir(parents=True)
        self._server = self._started()
        self.admin = redis.Redis(port=self.port, decode_responses=True, socket_timeout=30)
        return self

    def __exit__(self, *_: object) -> None:
        self.admin.close()
        self._server.stop()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def writes_at_once(self) -> bool:
        """Whether a write is on the disk before it is acknowledged."""
        return self._appendfsync == "always"

    data_url = url
    """The URL of the server that has the data."""

    @property
    def pid(self) -> int:
        return self._server.pid

    def stored_bytes(self) -> int:
        """The size of its files."""
        return sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())

    def restart(self, *, kill: bool, **options: str) -> None:
        """End the server, with SIGKILL or in order, and start it again with its data and these options."""
        if kill:
            os.kill(self.pid, signal.SIGKILL)
        self._server.stop()
        try:
            self._server = self._started(**options)
        except RedisUnreachable:  # it took too long with these options
            self._server = self._started_at_last()

    @contextmanager
    def full(self) -> Generator[None]:
        """Writes are refused with OOM during the `with` block."""
        with self._option("maxmemory", "1mb", otherwise="0"):
            yield

    @contextmanager
    def failed_snapshot(self) -> Generator[None]:
        """Writes are refused with MISCONF during the `with` block."""
        with self._option("save", SAVE_ONCE_AN_HOUR, otherwise=""):
            self.admin.bgsave()
            yield

    @contextmanager
    def read_only(self) -> Generator[None]:
        """Writes are refused with READONLY during the `with` block: its master does not exist."""
        self.admin.replicaof("127.0.0.1", "1")
        try:
            yield
        finally:
            self.admin.replicaof("NO", "ONE")

    @contextmanager
    def _option(self, name: str, value: str, *, otherwise: str) -> Generator[None]:
        self.admin.config_set(name, value)
        try:
            yield
        finally:
            self.admin.config_set(name, otherwise)

    def _started_at_last(self) -> EmbeddedRedis:
        """Start the server, again and again on a machine that is too busy. Nothing ends without it."""
        deadline = time.monotonic() + START_PATIENCE_S
        while True:
            try:
                return self._started()
            except RedisUnreachable:
                if time.monotonic() > deadline:
                    raise

    def _started(self, **options: str) -> EmbeddedRedis:
        extra = {"dbfilename": FAILED_SNAPSHOT, **options}
        server = EmbeddedRedis(self._folder, port=self.port, appendonly=self._appendfsync, extra=extra)
        return self._starter.run(server.start)


class RedisWithSentinel:
    """A master, a replica, and three sentinels that watch them."""

    def __init__(self, folder: Path, starter: Starter) -> None:
        folder.mkdir(parents=True)
        self._watched = Watched(folder, down_after_ms=DOWN_AFTER_MS)
        self._starter = starter
        self._held = ExitStack()

    def __enter__(self) -> Self:
        self._starter.run(self._watched.__enter__)
        self._held.push(self._watched)
        ports = [node.port for node in self._watched.nodes]
        self._failovers = self._held.enter_context(FailoverWatch(ports, PASSWORD))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def data_losses(self) -> list[tuple[float, float]]:
        """From when to when it may have lost data: also by a failover that nobody here asked for."""
        return self._failovers.losses

    @property
    def url(self) -> str:
        return self._watched.url

    @property
    def data_url(self) -> str:
        return self._watched.data_url

    @property
    def admin(self) -> redis.Redis:
        """A client of the current master."""
        return self._watched.master.client

    def fail_over(self, *, kill: bool) -> bool:
        """The replica becomes the master: its master is killed, or Sentinel replaces it.

        False: the replica has just begun to follow its master. Then Sentinel does not replace a master, and
        a master that is killed has writes that nobody else has.
        """
        if not self._has_follower():
            return False
        if kill:
            killed = self._watched.kill_master()
            self._starter.run(lambda: self._watched.bring_back(killed))
        else:
            former = self._watched.master
            try:
                self._watched.fail_over()
            except ResponseError as refusal:
                if "NOGOODSLAVE" not in str(refusal):
                    raise
                return False
            self._watched.make_replica(former)
        return True

    def _has_follower(self) -> bool:
        """Whether the replica has everything but the last moments."""
        found = self.admin.info("replication")
        replica = found.get("slave0", {})
        return replica.get("state") == "online" and int(replica.get("lag", MOST_LAG_S + 1)) <= MOST_LAG_S
