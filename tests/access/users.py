"""A Redis whose users are those of `config/acl/`. The only place that makes them; the server is real."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from openagents_worker.store.embedded import EmbeddedRedis
from openagents_worker.store.roles import RoleName

__all__ = ["ACL", "PASSWORD", "Guarded", "acl_words", "guarded"]

ACL = Path(__file__).parents[2] / "config" / "acl"
PASSWORD = "a-password-of-this-test"
NOT_NEEDED = "client|setinfo"  # Redis 7.0 does not know it, and redis-py goes on without it
PLACEHOLDER = ">REPLACE-THIS-PASSWORD"


def acl_words(role: RoleName) -> list[str]:
    """The arguments of `ACL SETUSER` that stand in the role's file, its user's name first."""
    user, *words = (ACL / f"{role}.acl").read_text().removeprefix("user ").split()
    return [user, *(f">{PASSWORD}" if word == PLACEHOLDER else word for word in words)]


@dataclass(frozen=True, slots=True)
class Guarded:
    """The server, seen by its administrator."""

    server: EmbeddedRedis
    admin: Any

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(map(int, self.admin.info("server")["redis_version"].split(".")))

    @property
    def can_tell_reading(self) -> bool:
        """Redis 7 and Valkey; before that a key that may be read may be written."""
        return self.version >= (7,)

    def set_user(self, role: RoleName, *more: str) -> None:
        """The role's user as in its file, and then these words."""
        words = [*acl_words(role), *more]
        if not self.can_tell_reading:
            words = [word.replace("%R~", "~") for word in words]
        self.admin.execute_command("ACL", "DELUSER", words[0])
        self.admin.execute_command("ACL", "SETUSER", *words)

    def url(self, role: RoleName) -> str:
        return f"redis://openagents-{role}:{PASSWORD}@127.0.0.1:{self.server.port}/0"

    def refusals(self) -> list[str]:
        """What Redis has refused since the last time, from its log."""
        entries = self.admin.acl_log()
        self.admin.acl_log_reset()
        said = [f"{one['username']}: {one['reason']} {one['object']} ({one['context']})" for one in entries]
        return [one for one in said if NOT_NEEDED not in one]


@contextmanager
def guarded() -> Generator[Guarded]:
    """A Redis with the users of all roles; `default` is its administrator."""
    with (
        EmbeddedRedis(extra={"acllog-max-len": "1000"}) as server,
        redis.Redis(port=server.port, decode_responses=True) as admin,
    ):
        found = Guarded(server, admin)
        for role in RoleName:
            found.set_user(role)
        yield found
