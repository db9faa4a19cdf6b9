"""The Redis server: the only place that reads what an operator must know of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openagents_worker.store.client import Store
from openagents_worker.store.durability import PersistenceInfo, queue_persistence_commands

__all__ = ["OLDEST_VERSION", "ServerInfo", "read_server"]

OLDEST_VERSION = (6, 2)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a Redis says about itself. None: unknown, because the user may not ask.

    `version` is that of Redis; Valkey names the version of Redis with which it is compatible. `clock_ms` is
    how far its clock is ahead of that of this machine, in milliseconds; the error is at most half of
    `answer_ms`, the time of an answer. `saves` is whether it writes snapshots (RDB), `folder` where it keeps
    its files.
    """

    version: tuple[int, ...] | None
    is_replica: bool | None
    is_cluster: bool | None
    used_memory_bytes: int | None
    saves: bool | None
    folder: str | None
    last_write_failed: bool
    clock_ms: int
    answer_ms: int
    persistence: PersistenceInfo

    @property
    def version_text(self) -> str:
        return "an unknown version" if self.version is None else ".".join(map(str, self.version))


def read_server(store: Store) -> ServerInfo:
    """Ask the Redis of this store. Raises `RedisUnreachable` and its subclasses."""
    sent_s = time.time()
    seconds, microseconds = store.ask(lambda redis: redis.time())
    answered_s = time.time()
    clock_s = seconds + microseconds / 1_000_000 - (sent_s + answered_s) / 2

    def everything(redis: Any) -> list[Any]:
        pipe = redis.pipeline(transaction=False)
        for section in ("server", "replication", "cluster"):
            pipe.info(section)
        pipe.config_get("save")
        pipe.config_get("dir")
        answers: list[Any] = queue_persistence_commands(pipe).execute(raise_on_error=False)
        return answers

    server, replication, cluster, save, folder, *persistence = store.ask(everything)
    memory, disk = _fields(persistence[0]), _fields(persistence[1])
    role, enabled = _fields(replication).get("role"), _fields(cluster).get("cluster_enabled")
    used, saves = memory.get("used_memory"), _fields(save).get("save")
    return ServerInfo(
        version=_version(_fields(server).get("redis_version")),
        is_replica=None if role is None else role not in ("master", "primary"),
        is_cluster=None if enabled is None else bool(int(enabled)),
        used_memory_bytes=None if used is None else int(used),
        saves=None if saves is None else bool(saves),
        folder=_fields(folder).get("dir"),
        last_write_failed="err" in (disk.get("aof_last_write_status"), disk.get("rdb_last_bgsave_status")),
        clock_ms=round(clock_s * 1000),
        answer_ms=round((answered_s - sent_s) * 1000),
        persistence=PersistenceInfo.of(persistence),
    )


def _fields(answer: Any) -> Mapping[str, Any]:
    """The fields of an answer; none if it is an error, because the user may not ask."""
    return answer if isinstance(answer, Mapping) else {}


def _version(text: Any) -> tuple[int, ...] | None:
    numbers = str(text or "").split(".")
    return tuple(map(int, numbers)) if all(number.isdigit() for number in numbers) else None
