"""Keeping. The only place that judges whether a Redis keeps what was accepted: on its disk, in its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openagents_worker.errors import RedisUnsafe

__all__ = ["WAIT_FOR_DISK", "WAIT_FOR_DISK_MS", "PersistenceInfo", "ask_persistence"]

WAIT_FOR_DISK_MS = 1_500  # `appendfsync everysec` takes up to a second, and a submission five in all
WAIT_FOR_DISK = ("WAITAOF", 1, 0, WAIT_FOR_DISK_MS)

EVICTING = ("allkeys-", "volatile-")  # all keys of a run get a TTL once it is over, and some before


def ask_persistence(pipe: Any) -> Any:
    """Queue the commands whose answers `PersistenceInfo.of` reads: `pipe.execute(raise_on_error=False)`."""
    pipe.info("memory")
    pipe.info("persistence")
    pipe.execute_command("COMMAND INFO", WAIT_FOR_DISK[0])
    pipe.config_get("appendfsync")
    return pipe


@dataclass(frozen=True, slots=True)
class PersistenceInfo:
    """What a Redis says of how it keeps what is written. None: it does not say, as where CONFIG is closed."""

    can_wait_for_disk: bool
    appendonly: bool | None
    appendfsync: str | None
    maxmemory_bytes: int | None
    maxmemory_policy: str | None

    @classmethod
    def of(cls, answers: Sequence[Any]) -> PersistenceInfo:
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
        """Whether a full memory makes it throw keys away; one without a limit is never full."""
        return (self.maxmemory_policy or "").startswith(EVICTING)

    def check_memory(self) -> None:
        """Raises `RedisUnsafe` where accepted runs would be thrown away when the memory is full."""
        if self.may_evict and self.maxmemory_bytes:
            raise RedisUnsafe(
                f"Redis throws keys away when its {self.maxmemory_bytes:,} bytes are full "
                f"(maxmemory-policy {self.maxmemory_policy}): accepted runs would be lost",
                hint="CONFIG SET maxmemory-policy noeviction, or give runs a Redis of their own",
            )

    def check_disk(self) -> None:
        """Raises `RedisUnsafe` where nobody can know that an accepted run is on the disk."""
        if self.appendonly is False:
            raise self._not_strict("its appendonly is off", "CONFIG SET appendonly yes")
        if self.appendfsync == "no":
            raise self._not_strict("its appendfsync is no", "CONFIG SET appendfsync everysec, or always")
        if not self.can_wait_for_disk and self.appendfsync != "always":
            raise self._not_strict(
                "it has no WAITAOF", "Redis 7.2 or Valkey has it; with an older one, appendfsync always"
            )

    @staticmethod
    def _not_strict(why: str, hint: str) -> RedisUnsafe:
        return RedisUnsafe(
            f"OPENAGENTS_DURABILITY is strict, and this Redis cannot say what is on its disk: {why}",
            hint=f"{hint}; or OPENAGENTS_DURABILITY=normal",
        )
