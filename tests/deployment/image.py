"""The image without Docker. The only place that follows a Dockerfile in a virtual environment.

`COPY`, `RUN pip install`, `ENV`, `WORKDIR` and `CMD` are done as they are written. Users and the system are
Docker's: a `FROM`, `USER` or other `RUN` is passed over only if it is known here.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.deployment.commands import ROOT

__all__ = ["Image"]

OF_DOCKER = ("FROM python:3.11-slim", "FROM openagents-worker", "USER ", "STOPSIGNAL SIGTERM", "RUN useradd ")


@dataclass
class Image:
    """What a Dockerfile has made: a folder in the place of `/`, an environment, variables and a command."""

    folder: Path
    environment: Path
    variables: dict[str, str] = field(default_factory=dict)
    workdir: Path = Path("/")
    command: list[str] = field(default_factory=list)

    def build(self, dockerfile: str, context: Path) -> None:
        """Follow it, with the files of this folder."""
        text = re.sub(r"\\\n", " ", dockerfile)
        for line in filter(None, (line.strip() for line in text.splitlines())):
            instruction, _, rest = line.partition(" ")
            match instruction:
                case "COPY":
                    *sources, target = rest.split()
                    for source in sources:
                        self._copy(context / source, target)
                case "ENV":
                    self.variables |= dict(pair.split("=", 1) for pair in shlex.split(rest))
                case "WORKDIR":
                    self.workdir = Path(rest)
                    self.here.mkdir(parents=True, exist_ok=True)
                case "CMD":
                    self.command = json.loads(rest)
                case "RUN" if rest.startswith("pip "):
                    self._pip(shlex.split(rest)[1:])
                case "RUN" if rest.startswith("install -d -o agents "):
                    (self.here / rest.split()[-1]).mkdir()
                case _:
                    assert line.startswith(("#", *OF_DOCKER)), (
                        f"these tests do not know how to follow {line!r}"
                    )

    @property
    def here(self) -> Path:
        """The working directory."""
        return self.folder / self.workdir.relative_to("/")

    def env(self, more: Mapping[str, str]) -> dict[str, str]:
        """A container's environment: nothing of this machine's."""
        path = f"{self.environment / 'bin'}:/usr/bin:/bin"
        return {"PATH": path, "HOME": str(self.here), **self.variables, **more}

    def _copy(self, source: Path, target: str) -> None:
        to = self.here / target
        assert source.exists(), f"COPY of what is not there: {source}"
        if source.is_dir():
            shutil.copytree(source, to, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copy2(source, to)

    def _pip(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.environment / "bin" / "python")]
        done = subprocess.run(
            [*command, *arguments], cwd=self.here, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-4000:]


def dockerfile_of_the_page() -> str:
    """The Dockerfile of a product, as docs/deployment.md shows it."""
    page = (ROOT / "docs" / "deployment.md").read_text()
    (found,) = re.findall(r"```dockerfile\n(.*?)```", page, re.DOTALL)
    return str(found)
