"""Versions. The only place that takes the previous commit out of the history and says whose code runs.

Both versions use this virtual environment. `PYTHONPATH` decides whose code is imported; every process is
asked which it was. `OPENAGENTS_TEST_PREVIOUS` names another revision than the commit before this one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.deployment import ROOT

__all__ = ["PRODUCT", "Version", "previous", "this"]

PRODUCT = Path(__file__).with_name("product")
"""What both versions carry: tools, an agents file, a producer. It names nothing of these tests."""

SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
"""Python 3.11.4 and newer ask how far an archive is trusted."""


@dataclass(frozen=True)
class Version:
    """The code in a folder. `name` is also the first part of its workers' names."""

    name: str
    folder: Path

    def env(self) -> dict[str, str]:
        """With this, a Python process imports this version, and nothing from where it was started."""
        return {
            "PYTHONPATH": os.pathsep.join(map(str, (self.folder, PRODUCT))),
            "PYTHONSAFEPATH": "1",
        }

    def begins_what_is_read_by(self, other: Version) -> bool:
        """Whether the other version reads the runs that this one begins."""
        return self._format("BEGUN") <= other._format("NEWEST_READ")

    def reads(self, format_: int) -> bool:
        """Whether this version reads runs of this format."""
        return format_ <= self._format("NEWEST_READ")

    @cache  # noqa: B019 - of two versions
    def _format(self, name: str) -> int:
        code = (
            f"from openagents_worker.store import formats; print(getattr(formats, {name!r}, formats.WRITTEN))"
        )
        env = {**os.environ, **self.env()}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    def wrote(self, file: str) -> bool:
        """Whether a module's file is of this version."""
        return Path(file).is_relative_to(self.folder / "openagents_worker")


def this() -> Version:
    return Version("new", ROOT)


def previous(folder: Path) -> Version:
    """The commit before this one, in a folder of its own. Skips where there is no history to take it from."""
    revision = os.environ.get("OPENAGENTS_TEST_PREVIOUS") or "HEAD~1"
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("the previous commit is needed, and this is no working tree of git")
    found = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    if found.returncode:
        shallow = _git("rev-parse", "--is-shallow-repository").stdout.strip() == "true"
        why = "this is a shallow clone: git fetch --unshallow" if shallow else found.stderr.strip()
        pytest.skip(f"the commit {revision} is needed, and is not there; {why}")
    archive = folder / "previous.tar"
    done = _git("archive", "--format=tar", f"--output={archive}", revision)
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "previous", **SAFELY)  # noqa: S202 - git has made it of this very repository
    return Version("old", folder / "previous")


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
