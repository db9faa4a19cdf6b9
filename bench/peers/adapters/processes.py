"""Processes of adapters: workers, Redis, PostgreSQL.

The only place of the adapters that starts and stops them.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

STOP_TIMEOUT_S = 10.0
START_TIMEOUT_S = 40.0
POSTGRES_PLACES = ("/usr/local/bin", "/usr/local/pgsql/bin", "/opt/homebrew/bin", "/opt/local/bin")


class NotMeasured(Exception):
    """This machine lacks something that the measurement needs. The text says what."""


class Child:
    """A process in a new process group. Its output goes to a file beside its data."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        folder: Path,
        *,
        pipe: bool = False,
        **options: Any,
    ) -> None:
        self.name = name
        self.output = folder / f"{name}.{time.monotonic_ns()}.out"
        with self.output.open("wb") as output:
            self._popen = subprocess.Popen(
                command,
                env=dict(env),
                cwd=folder,
                stdin=subprocess.PIPE if pipe else subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        self.stdin = self._popen.stdin

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def lives(self) -> bool:
        return self._popen.poll() is None

    def has(self, pid: int) -> bool:
        """Whether `pid` is this process or one of its descendants."""
        return pid in tree_of(self.pid)

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self._popen.poll() is not None:
                raise RuntimeError(f"{self.name} ended with {self._popen.returncode}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} is not up within {timeout_s:.0f} s: {self.last_words()}")
            time.sleep(0.02)

    def wait_until_said(self, words: str = "READY") -> None:
        self.wait_until(lambda: words.encode() in self.output.read_bytes())

    def last_words(self) -> str:
        return self.output.read_text(errors="replace")[-600:]

    def kill(self) -> None:
        """Kill the process and its group with SIGKILL, and wait for its end."""
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send the signal, and kill the process if it does not end."""
        if self._popen.poll() is None:
            self._popen.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(STOP_TIMEOUT_S)
        self.kill()


# --- memory and disk -------------------------------------------------------------------------------------


def tree_of(pid: int) -> set[int]:
    """The ids of the process and all its descendants (Linux)."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def megabytes_of(pid: int) -> float:
    """The memory of the process and all its descendants in MB, shared pages counted once (PSS)."""
    kilobytes = 0
    for each in tree_of(pid):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            kilobytes += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return kilobytes / 1024


def bytes_of(*files: Path) -> int:
    """The size of files, and of all files in folders."""
    total = 0
    for file in files:
        for each in file.rglob("*") if file.is_dir() else [file]:
            with contextlib.suppress(FileNotFoundError):
                total += each.stat().st_size
    return total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


# --- servers that several systems need -------------------------------------------------------------------


class Redis(Child):
    """A Redis or Valkey with an append-only file. The driver chooses the program."""

    def __init__(self, folder: Path, appendfsync: Literal["everysec", "always"]) -> None:
        self.data = folder / "redis"
        self.data.mkdir()
        self.port = free_port()
        settings = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.data), "save": ""}
        settings |= {"appendonly": "yes", "appendfsync": appendfsync, "auto-aof-rewrite-percentage": "0"}
        command = [os.environ["PEER_REDIS_SERVER"]]
        command += [part for name, value in settings.items() for part in (f"--{name}", value)]
        super().__init__("redis", command, os.environ, folder)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.wait_until(lambda: answers(self.port))

    def stored(self, client: Any) -> dict[str, int]:
        """The memory of all keys, and the size of the append-only file. `client` is a redis-py client."""
        keys = sum(client.memory_usage(key, samples=0) or 0 for key in client.scan_iter(count=1000))
        return {"Redis memory": keys, "append-only file": bytes_of(self.data)}

    def about(self, client: Any) -> dict[str, str]:
        server = client.info("server")
        name = server.get("server_name", "redis")
        return {name: server.get(f"{name}_version") or server["redis_version"]}


class Postgres(Child):
    """A PostgreSQL with the defaults of `initdb`. If this process is root, it runs as another user."""

    def __init__(self, folder: Path) -> None:
        places = _postgres_programs()
        self.data = folder / "postgres"
        self.data.mkdir()
        user = _other_user()
        as_user: dict[str, Any] = {}
        if user is not None:
            os.chown(self.data, user.pw_uid, user.pw_gid)
            as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self.port = free_port()
        cluster = self.data / "cluster"
        made = subprocess.run(
            [places["initdb"], "-D", cluster, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale"],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            **as_user,
        )
        if made.returncode != 0:
            raise NotMeasured(f"initdb failed: {made.stderr.strip()[-200:]}")
        command = [places["postgres"], "-D", str(cluster), "-p", str(self.port), "-h", "127.0.0.1"]
        command += ["-k", str(self.data)]
        super().__init__("postgres", command, {**os.environ, "LC_ALL": "C"}, folder, **as_user)
        self.wait_until(lambda: "ready to accept connections" in self.last_words())

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """A fast shutdown, which terminates open sessions."""
        super().stop(number)

    def stored(self, connection: Any) -> dict[str, int]:
        """The size of the database. `connection` is a psycopg connection in autocommit mode."""
        row = connection.execute("SELECT pg_database_size(current_database())").fetchone()
        return {"PostgreSQL database": row[0]}

    def about(self, connection: Any) -> dict[str, str]:
        return {"PostgreSQL": connection.execute("SHOW server_version").fetchone()[0]}

    def durability(self, connection: Any) -> str:
        fsync, commit = (
            connection.execute(f"SHOW {name}").fetchone()[0] for name in ("fsync", "synchronous_commit")
        )
        return f"PostgreSQL fsync={fsync}, synchronous_commit={commit}"


def _postgres_programs() -> dict[str, str]:
    newest_first = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    path = os.pathsep.join([os.environ.get("PATH", ""), *POSTGRES_PLACES, *newest_first])
    found = {name: shutil.which(name, path=path) for name in ("initdb", "postgres")}
    if missing := [name for name, place in found.items() if place is None]:
        raise NotMeasured(f"no {' and no '.join(missing)} found")
    return {name: str(place) for name, place in found.items()}


def _other_user() -> pwd.struct_passwd | None:
    """The user that runs PostgreSQL if this process is root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise NotMeasured("PostgreSQL does not run as root, and there is no user postgres or nobody")
