"""Processes: those that tests start with our command line or Celery's are forked from a fork server.

This is the only place that knows which ones. They are real processes with arguments, environment, files and
signals of their own; only their imports are done already. Everything else is started as usual: other
programs, other interpreters, other versions of the library, options of the interpreter.

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
SHARED = frozenset({"PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"})
"""… and those of them that the fork server applies, or that make no difference."""
_OPTIONS = ("preexec_fn", "pass_fds", "shell", "gid", "gids", "uid", "executable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-fork-server", action="store_true", help="start every process from the beginning")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fresh_process(reason): processes of this test are not forked")
    measured = "COVERAGE_PROCESS_CONFIG" in os.environ  # each process has to start its own measurement
    if sys.platform == "linux" and not config.getoption("--no-fork-server") and not measured:
        _ForkedPopen.server = _ForkServer()
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
    safe_path: bool = False


def _program(command: Any, env: Mapping[str, str], cwd: str) -> _Program | None:
    """The program of a command; None if it needs an interpreter of its own."""
    if not isinstance(command, list | tuple) or not all(isinstance(word, str | Path) for word in command):
        return None
    words = [str(word) for word in command]
    before = child_process.end_with_parent(())
    dies = words[: len(before)] == before and len(before) > 0
    words = words[len(before) :] if dies else words
    if _differs(env) or _has_another_library([cwd, *env.get("PYTHONPATH", "").split(os.pathsep)], cwd):
        return None
    match words:
        case [sys.executable, "-m", module, *arguments] if module in MODULES:
            return _Program(module, "", arguments, dies)
        case [script, *arguments] if Path(script) in _scripts():
            return _Program("", script, arguments, dies)
        case [sys.executable, script, *arguments] if Path(script) in _scripts():
            return _Program("", script, arguments, dies)
        case [sys.executable, "-P", script, *arguments] if Path(script) in SAFE_SCRIPTS:
            return _Program("", script, arguments, dies, safe_path=True)
    return None


def _scripts() -> set[Path]:
    return {Path(sys.executable).with_name(name) for name in SCRIPTS}


def _differs(env: Mapping[str, str]) -> bool:
    """Whether an interpreter would start differently with this environment than with that of the tests."""
    names = {name for name in (*env, *os.environ) if name.startswith(NOT_SHARED) and name not in SHARED}
    return any(env.get(name) != os.environ.get(name) for name in names)


def _has_another_library(folders: Sequence[str], cwd: str) -> bool:
    found = (Path(cwd, folder) for folder in folders if folder)
    return any((folder / OF_THE_LIBRARY).is_dir() and not folder.samefile(ROOT) for folder in found)


class _ForkServer:
    """The process of `fork_server.py`, from the first request to the end of the tests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None

    def fork(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """Start a process with these three files, and return its id. It is a child of this process."""
        with self._lock:
            control = self._connected()
            _adopt_orphans(True)
            try:
                socket.send_fds(control, [json.dumps(request).encode()], list(files))
                return int(control.recv(100))
            finally:
                _adopt_orphans(False)

    def _connected(self) -> socket.socket:
        if self._control is None:
            ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            self._process = _START(
                [sys.executable, str(SERVER), str(its.fileno())],
                env=env,
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            its.close()
            assert ours.recv(100) == b"ready", "the fork server did not start"
            self._control = ours
            atexit.register(self._stop)
        return self._control

    def _stop(self) -> None:
        assert self._control is not None
        self._control.close()
        self._process.wait()


def _adopt_orphans(on: bool) -> None:
    """Whether orphans below this process become its children, and not those of the first process."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


_START = subprocess.Popen
_PARAMETERS = inspect.signature(_START._execute_child)  # type: ignore[attr-defined]


class _ForkedPopen(_START):  # type: ignore[type-arg,valid-type,misc]
    """`subprocess.Popen`. Only the step that creates the process is another one, for the programs above."""

    server: _ForkServer
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
            self.pid = self.server.fork(request, files)
            self._child_created = True
        finally:
            self._close_pipe_fds(*(given[name] for name in _PIPES))

    def _forkable(self, given: Mapping[str, Any]) -> _Program | None:
        if _ForkedPopen.fresh or any(given[name] not in (None, (), False) for name in _OPTIONS):
            return None
        if given["umask"] != -1 or given["process_group"] != -1:
            return None
        env = os.environ if given["env"] is None else given["env"]
        return _program(given["args"], env, str(given["cwd"] or os.getcwd()))  # noqa: PTH109


_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
