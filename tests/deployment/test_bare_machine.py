"""A bare machine: a clone, a Python and nothing else. Both commands of the README do all of their set-up.

Installing takes minutes and asks a package index, so these tests are slow ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.deployment.commands import MARK, ROOT, marked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PASSED_ON = ("PIP_", "SSL_CERT_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
"""How this machine reaches its package index; nothing else of its environment is there."""


@pytest.fixture
def clone(tmp_path: Path) -> Generator[Path]:
    """What git knows of this folder, changes included, in a new one."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = tmp_path / "clone"
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # a file that was deleted is still listed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    yield folder
    shutil.rmtree(folder)  # a virtual environment is large


def make(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make with an environment that has a Python, and no Redis."""
    home, programs = clone.parent / "home", clone.parent / "bin"
    for folder in (home, programs):
        folder.mkdir()
    (programs / "python3").symlink_to(sys._base_executable)  # type: ignore[attr-defined]  # not this venv's
    path = f"{programs}:/usr/bin:/bin"
    for server in ("redis-server", "valkey-server"):
        if shutil.which(server, path=path):
            pytest.skip(f"{server} is installed on this machine, so it is not a bare one")
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    env = {**passed_on, "PATH": path, "HOME": str(home), MARK: str(clone)}
    return subprocess.run(
        ["make", *arguments], cwd=clone, env=env, capture_output=True, text=True, timeout=800
    )


def test_make_demo_works_on_a_bare_machine(clone: Path) -> None:
    """It installs, shows a run that survives its worker, and leaves no process."""
    ended = make(clone, "demo")

    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert ended.stdout.count("stop reason  completed") == 2
    assert "entries, 0 duplicates" in ended.stdout
    assert marked(str(clone)) == []


def test_make_test_works_on_a_bare_machine(clone: Path) -> None:
    """Here with the first page of the manual only."""
    ended = make(clone, "test", "ARGS=tests/fundamentals/test_01_a_run.py")

    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert " passed" in ended.stdout
    assert marked(str(clone)) == []
