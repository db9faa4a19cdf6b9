"""Durability: the only place that judges whether a Redis may lose accepted runs.

It checks how Redis writes to its disk (AOF), and what it does when its memory is full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.errors import RedisUnsafe

__all__ = ["WAITAOF", "WAITAOF_TIMEOUT_MS", "PersistenceInfo", "queue_persistence_commands"]

WAITAOF_TIMEOUT_MS = 1_500  # `appendfsync everysec` takes up to a second; a submission may take five
WAITAOF = ("WAITAOF", 1, 0, WAITAOF_TIMEOUT_MS)

# `volatile-` loses data, too: every key of an ended run has a TTL, and some keys of a live run have one.
EVICTING_POLICIES = ("allkeys-", "volatile-")


def queue_persistence_commands(pipe: Any) -> Any:
    """Add the commands to a pipeline whose answers `PersistenceInfo.of` parses.

    Execute the pipeline with `raise_on_error=False`: a user may lack the right to a command.
    """
    pipe.info("memory")
    pipe.info("persistence")
    pipe.execute_command("COMMAND INFO", WAITAOF[0])
    pipe.config_get("appendfsync")
    return pipe


@dataclass(frozen=True, slots=True)
class PersistenceInfo:
    """The persistence settings of a Redis. None: unknown, for example because CONFIG is not allowed.

    `can_wait_for_disk`: the server has the command WAITAOF.
    """

    can_wait_for_disk: bool
    appendonly: bool | None
    appendfsync: str | None
    maxmemory_bytes: int | None
    maxmemory_policy: str | None

    @classmethod
    def of(cls, answers: Sequence[Any]) -> PersistenceInfo:
        """From the answers to `queue_persistence_commands`, where each may be an exception."""
        memory, persistence, commands, config = answers
        memory, persistence, config = (
            answer if isinstance(answer, Mapping) else {} for answer in (memory, persistence, config)
        )
        aof, bytes_ = persistence.get("aof_enabled"), memory.get("maxmemory")
        return cls(
            can_wait_for_disk=isinstance(commands, list) and bool(commands) and commands[0] is not None,
            appendonly=None if aof is None else bool(int(aof)),
            appendfsync=config.get("appendfsync"),
            maxmemory_bytes=None if bytes_ is None else int(bytes_),
            maxmemory_policy=memory.get("maxmemory_policy"),
        )

    @property
    def may_evict(self) -> bool:
        """Whether the policy deletes keys when the memory is full. This needs `maxmemory`, too."""
        return (self.maxmemory_policy or "").startswith(EVICTING_POLICIES)

    def check_memory(self) -> None:
        """Raises `RedisUnsafe` if Redis would delete accepted runs when its memory is full."""
        if self.may_evict and self.maxmemory_bytes:
            raise RedisUnsafe(
                f"Redis deletes keys when its {self.maxmemory_bytes:,} bytes of memory are full "
                f"(maxmemory-policy {self.maxmemory_policy}): accepted runs would be lost",
                hint="run CONFIG SET maxmemory-policy noeviction, or use a separate Redis for runs",
            )

    def check_disk(self) -> None:
        """Raises `RedisUnsafe` if this Redis cannot confirm that an accepted run is on its disk."""
        if self.appendonly is False:
            raise self._strict_mode_error("appendonly is off", "run CONFIG SET appendonly yes")
        if self.appendfsync == "no":
            raise self._strict_mode_error(
                "appendfsync is no", "run CONFIG SET appendfsync everysec (or always)"
            )
        if not self.can_wait_for_disk and self.appendfsync != "always":
            raise self._strict_mode_error(
                "it does not support WAITAOF",
                "use Redis 7.2 or later, or Valkey; or set appendfsync to always on an older Redis",
            )

    @staticmethod
    def _strict_mode_error(why: str, hint: str) -> RedisUnsafe:
        return RedisUnsafe(
            f"OPENAGENTS_DURABILITY is strict, but this Redis cannot confirm that data is on its disk: {why}",
            hint=f"{hint}; or set OPENAGENTS_DURABILITY=normal",
        )
