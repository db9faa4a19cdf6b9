"""A real Redis server whose users are those of `config/acl/`: the only place that creates it."""

from __future__ import annotations

import re
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import redis
import redis.asyncio as redis_async

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.store.roles import RoleName

__all__ = ["ACL", "PASSWORD", "Guarded", "UseOfCommands", "acl_words", "guarded"]

ACL = Path(__file__).parents[2] / "config" / "acl"
PASSWORD = "a-password-of-this-test"
NOT_NEEDED = "client|setinfo"  # Redis 7.0 does not have it, and redis-py works without it
LOOK_S = 0.02
_MONITORED = re.compile(rb'^\+?[0-9.]+ \[\d+ ([^\]]+)\] "([^"]+)"')
PLACEHOLDER = ">REPLACE-THIS-PASSWORD"


def acl_words(role: RoleName) -> list[str]:
    """The arguments of `ACL SETUSER` in the file of the role, first the name of the user."""
    user, *words = (ACL / f"{role}.acl").read_text().removeprefix("user ").split()
    return [user, *(f">{PASSWORD}" if word == PLACEHOLDER else word for word in words)]


@dataclass(frozen=True, slots=True)
class Guarded:
    """The server, with the connection of its administrator."""

    server: EmbeddedRedis
    admin: Any

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(map(int, self.admin.info("server")["redis_version"].split(".")))

    @property
    def can_tell_reading(self) -> bool:
        """Redis 7 and Valkey distinguish reading and writing.

        In earlier versions, every readable key may be written.
        """
        return self.version >= (7,)

    def set_user(self, role: RoleName, *more: str) -> None:
        """Set the user of the role as in its file, then apply these words."""
        words = [*acl_words(role), *more]
        if not self.can_tell_reading:
            words = [word.replace("%R~", "~") for word in words]
        self.admin.execute_command("ACL", "DELUSER", words[0])
        self.admin.execute_command("ACL", "SETUSER", *words)

    def url(self, role: RoleName) -> str:
        return f"redis://openagents-{role}:{PASSWORD}@127.0.0.1:{self.server.port}/0"

    def refusals(self) -> list[str]:
        """The commands that Redis has refused since the previous call, from its ACL log."""
        entries = self.admin.acl_log()
        self.admin.acl_log_reset()
        said = [f"{one['username']}: {one['reason']} {one['object']} ({one['context']})" for one in entries]
        not_needed = NOT_NEEDED if self.can_tell_reading else "command client "
        return [one for one in said if not_needed not in one]


class UseOfCommands:
    """Records the commands of each user, including those in scripts, for the duration of the block.

    Redis names the address from which a command came. This process knows the addresses of its own
    connections, and asks Redis for those of connections that last.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._users_of: defaultdict[str, set[str]] = defaultdict(set)  # in order: ports are used again
        self._heard: set[tuple[str, str]] = set()
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=each, name=each.__name__) for each in (self._hear, self._look)
        ]
        self._socket = socket.create_connection(("127.0.0.1", port))

    def __enter__(self) -> Self:
        self._patched = pytest.MonkeyPatch()
        for kind in (redis.connection.AbstractConnection, redis_async.connection.AbstractConnection):
            self._patched.setattr(kind, "on_connect_check_health", self._noting(kind.on_connect_check_health))
        for thread in self._threads:
            thread.start()
        return self

    def _noting(self, on_connect: Callable[..., Any]) -> Callable[..., Any]:
        def noting(connection: Any, *args: Any, **options: Any) -> Any:
            sock = getattr(connection, "_sock", None) or connection._writer.get_extra_info("socket")
            host, port, *_ = sock.getsockname()
            self._users_of[f"{host}:{port}"].add(str(connection.username))
            return on_connect(connection, *args, **options)

        return noting

    def __exit__(self, *_: object) -> None:
        self._patched.undo()
        self._over.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._socket.close()

    def of(self, role: RoleName) -> set[str]:
        """The commands of the user of a role in the words of an ACL; for commands of two words, the first
        one."""
        mine = {address for address, users in self._users_of.items() if f"openagents-{role}" in users}
        return {command for address, command in list(self._heard) if address in mine}

    def _hear(self) -> None:
        self._socket.sendall(b"MONITOR\r\n")
        address = ""
        with self._socket.makefile("rb") as lines:
            for line in lines:
                if found := _MONITORED.match(line):
                    in_script = found[1] == b"lua"
                    address = address if in_script else found[1].decode()
                    self._heard.add((address, found[2].decode().lower()))

    def _look(self) -> None:
        with redis.Redis(port=self._port, decode_responses=True) as admin:
            while not self._over.wait(LOOK_S):
                for one in admin.client_list():
                    self._users_of[one["addr"]].add(one["user"])


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
