"""A Redis that sentinels watch. The only place that starts a master, its replica and the sentinels.

All are processes of their own on free ports, which end with the block.
"""

from __future__ import annotations

import subprocess
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import redis

from openagents_worker.local.child_process import end_with_parent
from openagents_worker.local.redis_server import find_server
from openagents_worker.redis_url import Sentinels
from tests.deployment.commands import free_port
from tests.support.waiting import wait_for

__all__ = ["MASTER", "PASSWORD", "SENTINEL_PASSWORD", "Server", "Watched", "watching"]

MASTER = "main"
PASSWORD = "data/pass,word"
SENTINEL_PASSWORD = "sentinel;pass"
DOWN_AFTER_MS = 1_000


class Server:
    """One process: a Redis, or with `--sentinel` among its arguments one who watches others."""

    def __init__(self, folder: Path, name: str, password: str, lines: list[str], *arguments: str) -> None:
        self.name = name
        self.port = free_port()
        self._folder = folder
        self._arguments = arguments
        file = folder / f"{name}.conf"
        file.write_text("\n".join([f"port {self.port}", "bind 127.0.0.1", f"requirepass {password}", *lines]))
        self.client = redis.Redis(port=self.port, password=password, decode_responses=True)
        self.start()

    def start(self, *more: str) -> None:
        command = [str(find_server()), str(self._folder / f"{self.name}.conf"), *self._arguments, *more]
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                end_with_parent([*command, "--dir", str(self._folder)]),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(self._answers, f"{self.name} answers")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.client.close()
        self.kill()

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            assert self.is_alive, f"{self.name} has ended"
            return False


@contextmanager
def watching(port: int, folder: Path) -> Generator[Sentinels]:
    """One sentinel that watches a Redis of somebody else's, without a password and without a replica."""
    lines = [f"sentinel monitor {MASTER} 127.0.0.1 {port} 1"]
    with closing(Server(folder, "sentinel", SENTINEL_PASSWORD, lines, "--sentinel")) as server:
        hosts = (("127.0.0.1", server.port),)
        yield Sentinels(hosts, MASTER, sentinel_password=SENTINEL_PASSWORD)


class Watched:
    """A master and a replica with one password, three sentinels with another."""

    def __init__(self, folder: Path, *, sentinels: int = 3, down_after_ms: int = DOWN_AFTER_MS) -> None:
        self._folder = folder
        self._down_after_ms = down_after_ms
        self._count = sentinels
        self._held = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as held:
            self._held = held
            first = self._started("redis-1", PASSWORD, [f"masterauth {PASSWORD}"])
            second = self._started(
                "redis-2", PASSWORD, [f"masterauth {PASSWORD}", f"replicaof 127.0.0.1 {first.port}"]
            )
            self.nodes = [first, second]
            wait_for(lambda: second.client.info("replication")["master_link_status"] == "up", "a replica")
            watching = [
                f"sentinel monitor {MASTER} 127.0.0.1 {first.port} {self._count // 2 + 1}",
                f"sentinel auth-pass {MASTER} {PASSWORD}",
                f"sentinel down-after-milliseconds {MASTER} {self._down_after_ms}",
                f"sentinel failover-timeout {MASTER} 1000",
                f"sentinel sentinel-pass {SENTINEL_PASSWORD}",
            ]
            self.sentinels = [
                self._started(f"sentinel-{n}", SENTINEL_PASSWORD, watching, "--sentinel")
                for n in range(self._count)
            ]
            wait_for(self._is_complete, "the sentinels know each other and the replica")
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def address(self) -> Sentinels:
        return Sentinels(
            tuple(("127.0.0.1", sentinel.port) for sentinel in self.sentinels),
            MASTER,
            password=PASSWORD,
            sentinel_password=SENTINEL_PASSWORD,
        )

    @property
    def url(self) -> str:
        return self.address.url

    @property
    def data_url(self) -> str:
        """Of the master of now, without sentinels."""
        return f"redis://:{quote(PASSWORD, safe='')}@127.0.0.1:{self.master.port}/0"

    @property
    def master(self) -> Server:
        """The one that says so itself and that all sentinels name."""
        return wait_for(self._agreed_master, "one master, for all sentinels")

    @property
    def replica(self) -> Server:
        """The other one."""
        master = self.master
        return next(node for node in self.nodes if node is not master)

    def settle(self) -> Server:
        """Wait until the replica has all that was written: replication is asynchronous. Returns the master.

        On a busy machine sentinels may replace a master that was only slow: then the next one is waited for.
        """

        def settled() -> Server | None:
            master = self.master
            try:
                return master if master.client.wait(1, 10_000) == 1 else None
            except redis.ResponseError:  # it is a replica by now
                return None

        return wait_for(settled, "the replica has everything")

    def fail_over(self) -> Server:
        """Let the replica take over from a master that lives; returns the new master."""
        before = self.settle()

        def replaced() -> Server | None:
            self._ask_for_failover(before)
            return self._agreed_other_than(before)

        return wait_for(replaced, "another master")

    def _ask_for_failover(self, before: Server) -> None:
        """Ask a sentinel, unless it does it already: on a busy machine it may give up what it has begun."""
        sentinel = self.sentinels[0].client
        known = sentinel.sentinel_master(MASTER)
        if known["port"] == before.port and "failover_in_progress" not in str(known["flags"]):
            with suppress(redis.ResponseError):  # it cannot begin yet
                sentinel.execute_command("SENTINEL", "FAILOVER", MASTER)

    def kill_master(self) -> Server:
        """SIGKILL the master, once its replica has all; returns the one that was killed."""
        before = self.settle()
        before.kill()
        return before

    def bring_back(self, server: Server) -> None:
        """Start a server that was killed as the replica of the master."""
        server.start("--replicaof", f"127.0.0.1 {self.master.port}")
        self.settle()

    def make_replica(self, former: Server) -> None:
        """Do at once what sentinels do some ten seconds after a master was replaced while it lives."""
        former.client.replicaof("127.0.0.1", str(self.master.port))
        self.settle()

    def _started(self, *arguments: Any) -> Server:
        server = Server(self._folder, *arguments)
        self._held.callback(server.close)
        return server

    def _agreed_master(self) -> Server | None:
        named = {str(sentinel.client.sentinel_master(MASTER)["port"]) for sentinel in self.sentinels}
        alive = [node for node in self.nodes if node.is_alive]
        found = [node for node in alive if {str(node.port)} == named]
        return found[0] if found and found[0].client.role()[0] == "master" else None

    def _agreed_other_than(self, before: Server) -> Server | None:
        found = self._agreed_master()
        return None if found is before else found

    def _is_complete(self) -> bool:
        states = [sentinel.client.sentinel_master(MASTER) for sentinel in self.sentinels]
        return all(
            (state["num-other-sentinels"], state["num-slaves"]) == (self._count - 1, 1) for state in states
        )
