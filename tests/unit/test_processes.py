"""Processes that tests start: a forked one is as one that was started from the beginning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.local.child_process import end_with_parent
from tests.support.processes import SAFE_SCRIPTS, _ForkedPopen, fresh_processes

FACTS = """
import json, os, signal, sys
print(json.dumps({
    "environment": dict(os.environ),
    "directory": os.getcwd(),
    "parent": os.getppid(),
    "own session": os.getsid(0) == os.getpid(),
    "path": sys.path,
    "arguments": sys.argv,
    "streams": [[s.encoding, s.errors, s.line_buffering] for s in (sys.stdin, sys.stdout, sys.stderr)],
    "files": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:3],
    "signals": [str(signal.getsignal(one)).partition(" at ")[0] for one in sorted(signal.valid_signals())],
    "asked to end with": sys.stdin.read(),
}))
"""


def facts(folder: Path, **options: Any) -> dict[str, Any]:
    """What a process knows of itself."""
    block = folder / "facts.py"
    block.write_text(FACTS)
    command = [sys.executable, "-P", *map(str, SAFE_SCRIPTS), "facts", "1", str(block)]
    env = {**os.environ, "PYTHONPATH": str(folder), "OF_THE_TEST": "ä"}
    done = subprocess.run(command, env=env, cwd=folder, input="x", capture_output=True, text=True, **options)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def is_forking() -> bool:
    return issubclass(subprocess.Popen, _ForkedPopen)


pytestmark = pytest.mark.skipif(
    not is_forking(), reason="no process is forked here: see tests/support/processes.py"
)


@pytest.mark.parametrize("new_session", [False, True])
def test_a_forked_process_is_as_a_fresh_one(tmp_path: Path, new_session: bool) -> None:
    """Environment, directory, session, path, arguments, files and signal handlers; and its parent is this
    process."""
    forked = facts(tmp_path, start_new_session=new_session)
    with fresh_processes():
        fresh = facts(tmp_path, start_new_session=new_session)

    assert forked == fresh
    assert forked["parent"] == os.getpid()


def test_its_exit_code_and_its_signals_arrive(tmp_path: Path) -> None:
    """As those of any child process."""
    command = [sys.executable, "-m", "openagents_worker.cli"]
    ended = subprocess.run([*command, "no-such-command"], capture_output=True, text=True)
    with subprocess.Popen(end_with_parent([*command, "dev", "--help"]), stdout=subprocess.DEVNULL) as process:
        process.send_signal(signal.SIGKILL)

    assert (ended.returncode, "No such command" in ended.stderr) == (1, True)
    assert process.returncode == -signal.SIGKILL


def test_code_that_the_interpreter_executes_first_is_executed(tmp_path: Path) -> None:
    """Tests put a `sitecustomize` on the path."""
    (tmp_path / "sitecustomize.py").write_text("print('first')")
    command = [sys.executable, "-m", "openagents_worker.cli", "--version"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    assert subprocess.run(command, env=env, capture_output=True, text=True).stdout.startswith("first\n")


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "env"),
    [
        ([sys.executable, "-c", "print(1)"], {}),
        ([sys.executable, "-W", "error", "-m", "openagents_worker.cli", "--version"], {}),
        ([sys.executable, "-m", "openagents_worker.cli", "--version"], {"PYTHONWARNINGS": "error"}),
        (["sh", "-c", "true"], {}),
    ],
)
def test_everything_else_starts_as_usual(
    command: list[str], env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other programs, options of the interpreter, variables that it reads when it starts."""
    monkeypatch.setattr(_ForkedPopen.servers, "fork", lambda *_: pytest.fail("it was forked"))

    assert subprocess.run(command, env={**os.environ, **env}, capture_output=True).returncode == 0


def test_each_process_has_the_version_of_the_library_on_its_path(tmp_path: Path) -> None:
    """A folder on `PYTHONPATH`, or the current one, has a package of its name."""
    package, elsewhere = tmp_path / "openagents_worker", tmp_path / "elsewhere"
    package.mkdir()
    elsewhere.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text("print('the other one')")
    command = [sys.executable, "-m", "openagents_worker.cli"]
    on_path: dict[str, Any] = {"cwd": elsewhere, "env": {**os.environ, "PYTHONPATH": str(tmp_path)}}
    for options in ({"cwd": tmp_path}, on_path):
        assert subprocess.run(command, capture_output=True, text=True, **options).stdout == "the other one\n"
