"""The oldest versions that are promised. The only place that makes a virtual environment with them.

Which they are is read from `pyproject.toml`: of every dependency the lowest version that it allows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.deployment import ROOT

__all__ = ["OldProduct", "lowest_versions"]

PROGRAMS = Path(__file__).with_name("old_product.py")
TIMEOUT_S = 100


def lowest_versions(*extras: str) -> dict[str, Version]:
    """Of each package that the base install with these extras needs, the lowest version it may have."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *chain(*(project["optional-dependencies"][name] for name in extras))]
    lowest: dict[str, Version] = {}
    for one in map(Requirement, texts):
        name = canonicalize_name(one.name)
        for spec in one.specifier:
            if spec.operator == ">=":
                lowest[name] = max(Version(spec.version), lowest.get(name, Version("0")))
    return lowest


@dataclass(frozen=True)
class OldProduct:
    """An application in a separate virtual environment: the base install with the oldest dependencies."""

    folder: Path

    @classmethod
    def installed(cls, folder: Path) -> OldProduct:
        """Makes the environment; asks the package index that pip is set up for."""
        product = cls(folder)
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
        pins = [f"{name}=={version}" for name, version in lowest_versions().items()]
        done = product._pip("install", "--quiet", *pins, str(ROOT))
        assert done.returncode == 0, done.stderr[-4000:]
        return product

    def versions(self) -> dict[str, Version]:
        listed = json.loads(self._pip("list", "--format=json").stdout)
        return {canonicalize_name(entry["name"]): Version(entry["version"]) for entry in listed}

    def python(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A fresh interpreter that takes every warning for an error and sees nothing of this repository."""
        return self.run("python", "-I", "-W", "error", *arguments, **env)

    def run(self, command: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.folder / "bin" / command), *arguments],
            cwd=self.folder,  # not the repository, from which Python would import
            env=_without_ours(os.environ) | env,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def tell(self, program: str, *, leaves_sockets: bool = False, **env: str) -> Any:
        """What one of the programs in `old_product.py` returns; it must not say anything else.

        `leaves_sockets`: what it uses of others leaves some to the interpreter's end, which may say so.
        """
        quietly = ("-W", "ignore:unclosed:ResourceWarning") if leaves_sockets else ()
        done = self.python(*quietly, str(PROGRAMS), program, **env)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr[-4000:]
        return json.loads(done.stdout)

    def _pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        python = str(self.folder / "bin" / "python")
        return _run([sys.executable, "-m", "pip", "--python", python, *arguments])


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)


def _without_ours(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if not name.startswith(("OPENAGENTS_", "PYTHON"))}
