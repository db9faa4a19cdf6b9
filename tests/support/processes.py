"""Processes: those that tests start with our command line or Celery's are forked from a fork server.

This is the only place that knows which ones. They are real processes with arguments, environment, files and
signals of their own; only their imports are done already. Each version of the library has a server of its
own. Everything else is started as usual: other programs, other interpreters, options of the interpreter.

`pytest --no-fork-server` starts all of them as usual, as does every system but Linux, and a measurement of
coverage. The mark `fresh_process` does so for tests of what a process imports, and of how it begins.
"""

from __future__ import annotations

import atexit
import ctypes
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.local import child_process

ROOT = Path(__file__).parents[2]
SERVER = Path(__file__).with_name("fork_server.py")
PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)
MODULES = frozenset({"openagents_worker.cli", "openagents_worker.testing.model_server", "celery"})
SCRIPTS = frozenset({"openagents-worker", "celery"})
SAFE_SCRIPTS = frozenset({ROOT / "tests" / "docs" / "run_block.py"})
"""Scripts that are called with `python -P`: their folder is not on the path."""
OF_THE_LIBRARY = "openagents_worker"
NOT_SHARED = ("PYTHON", "LANG", "LC_", "LD_")
"""Environment variables that an interpreter reads when it starts, by their first letters …"""
SHARED = frozenset({"PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"})
"""… and those of them that the fork server applies, or that make no difference."""
NOT_FOR_THE_SERVER = frozenset({"PYTHONPATH", "PYTHONSAFEPATH"})
_OPTIONS = ("preexec_fn", "pass_fds", "shell", "gid", "gids", "uid", "executable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-fork-server", action="store_true", help="start every process from the beginning")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fresh_process(reason): processes of this test are not forked")
    measured = "COVERAGE_PROCESS_CONFIG" in os.environ  # each process has to start its own measurement
    if sys.platform == "linux" and not config.getoption("--no-fork-server") and not measured:
        _ForkedPopen.servers = _ForkServers()
        subprocess.Popen = _ForkedPopen  # type: ignore[misc]  # for the tests and for the library alike


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if item.get_closest_marker("fresh_process") is None:
        return (yield)
    with fresh_processes():
        return (yield)


@contextmanager
def fresh_processes() -> Generator[None]:
    """Within the block, processes are started from the beginning."""
    before, _ForkedPopen.fresh = _ForkedPopen.fresh, True
    try:
        yield
    finally:
        _ForkedPopen.fresh = before


@dataclass(frozen=True)
class _Program:
    """A program that the fork server can become: a module or a script, and its arguments."""

    module: str
    script: str
    arguments: Sequence[str]
    dies_with_parent: bool
    safe_path: bool
    library: Path
    """The folder of the library's version."""


def _program(command: Any, env: Mapping[str, str], cwd: str) -> _Program | None:
    """The program of a command; None if it needs an interpreter of its own."""
    if not isinstance(command, list | tuple) or not all(isinstance(word, str | Path) for word in command):
        return None
    words = [str(word) for word in command]
    before = child_process.end_with_parent(())
    dies = words[: len(before)] == before and len(before) > 0
    words = words[len(before) :] if dies else words
    if _differs(env) or _has_own_start(env, cwd):
        return None
    safe = bool(env.get("PYTHONSAFEPATH"))
    match words:
        case [sys.executable, "-m", module, *arguments] if module in MODULES:
            return _Program(module, "", arguments, dies, safe, _library(env, "" if safe else cwd, cwd))
        case [script, *arguments] if Path(script) in _scripts():
            return _Program("", script, arguments, dies, safe, _library(env, "", cwd))
        case [sys.executable, script, *arguments] if Path(script) in _scripts():
            return _Program("", script, arguments, dies, safe, _library(env, "", cwd))
        case [sys.executable, "-P", script, *arguments] if Path(script) in SAFE_SCRIPTS:
            return _Program("", script, arguments, dies, True, _library(env, "", cwd))
    return None


def _scripts() -> set[Path]:
    return {Path(sys.executable).with_name(name) for name in SCRIPTS}


def _differs(env: Mapping[str, str]) -> bool:
    """Whether an interpreter would start differently with this environment than with that of the tests."""
    names = {name for name in (*env, *os.environ) if name.startswith(NOT_SHARED) and name not in SHARED}
    return any(env.get(name) != os.environ.get(name) for name in names)


def _has_own_start(env: Mapping[str, str], cwd: str) -> bool:
    """Whether a folder on `PYTHONPATH` has code that the interpreter executes when it starts."""
    folders = [Path(cwd, folder) for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    return any((folder / f"{name}customize.py").exists() for folder in folders for name in ("site", "user"))


def _library(env: Mapping[str, str], first: str, cwd: str) -> Path:
    """The folder from which a process imports the library: the first on its path that has it."""
    folders = [first, *env.get("PYTHONPATH", "").split(os.pathsep)]
    on_path = [Path(cwd, folder) for folder in folders if folder]
    return next((folder.resolve() for folder in on_path if (folder / OF_THE_LIBRARY).is_dir()), ROOT)


class _ForkServers:
    """A fork server for each version of the library."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_library: dict[Path, _ForkServer] = {}

    def fork(self, library: Path, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """Start a process with these three files, and return its id. It is a child of this process."""
        with self._lock:
            server = self._by_library.get(library) or _ForkServer(library)
            self._by_library[library] = server
            return server.fork(request, files)


class _ForkServer:
    """A process of `fork_server.py`, until the end of the tests."""

    def __init__(self, library: Path) -> None:
        self._control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = _START(
            [sys.executable, str(SERVER), str(its.fileno()), str(library)],
            env={name: value for name, value in os.environ.items() if name not in NOT_FOR_THE_SERVER},
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        its.close()
        atexit.register(self._stop)
        assert self._control.recv(100) == b"ready", "the fork server did not start"

    def fork(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        _adopt_orphans(True)
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], list(files))
            return int(self._control.recv(100))
        finally:
            _adopt_orphans(False)

    def _stop(self) -> None:
        self._control.close()
        self._process.wait()


def _adopt_orphans(on: bool) -> None:
    """Whether orphans below this process become its children, and not those of the first process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


_START = subprocess.Popen
_PARAMETERS = inspect.signature(_START._execute_child)  # type: ignore[attr-defined]


class _ForkedPopen(_START):  # type: ignore[type-arg,valid-type,misc]
    """`subprocess.Popen`. Only the step that creates the process is another one, for the programs above."""

    servers: _ForkServers
    fresh = False

    def _execute_child(self, *args: Any) -> None:
        given = _PARAMETERS.bind(self, *args).arguments
        if (program := self._forkable(given)) is None:
            super()._execute_child(*args)
            return
        request = {
            "module": program.module,
            "script": program.script,
            "arguments": program.arguments,
            "dies_with_parent": program.dies_with_parent,
            "safe_path": program.safe_path,
            "env": dict(os.environ if given["env"] is None else given["env"]),
            "cwd": str(Path(given["cwd"] or ".").absolute()),
            "new_session": given["start_new_session"],
        }
        files = [
            standard if end == -1 else end
            for standard, end in enumerate((given["p2cread"], given["c2pwrite"], given["errwrite"]))
        ]
        try:
            self.pid = self.servers.fork(program.library, request, files)
            self._child_created = True
        finally:
            self._close_pipe_fds(*(given[name] for name in _PIPES))  # type: ignore[attr-defined]  # not in typeshed

    def _forkable(self, given: Mapping[str, Any]) -> _Program | None:
        if _ForkedPopen.fresh or any(given[name] not in (None, (), False) for name in _OPTIONS):
            return None
        if given["umask"] != -1 or given["process_group"] != -1:
            return None
        env = os.environ if given["env"] is None else given["env"]
        return _program(given["args"], env, str(given["cwd"] or os.getcwd()))  # noqa: PTH109


_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
