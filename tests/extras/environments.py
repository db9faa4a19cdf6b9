"""Empty environments with our wheel in them. The only place that makes one.

Nothing of this repository and nothing of the tests' own environment can be imported there. Everything that is
installed is downloaded once for all environments, into a folder that pip then takes it from.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.adopt.oldest import lowest_versions
from tests.deployment.commands import ROOT, Running, running

__all__ = ["EXTRAS", "Environment", "Environments"]

EXTRAS = (
    *("worker", "embedded", "flower", "uvloop", "otel", "http2", "mcp", "metrics", "tokenizers", "zep"),
    *("langfuse", "phoenix", "rich"),
)
BESIDE = ("django>=5,<6", "fastapi>=0.115,<1", "uvicorn>=0.30,<1", "gevent", "eventlet")
"""What the tests install beside us: a product's framework, and the pools that are refused."""

TIMEOUT_S = 240


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and the folder of a project that uses it."""

    folder: Path
    extras: tuple[str, ...]
    project: Path

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def variables(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a shell in which the environment is active would have, and no setting of ours."""
        return {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.project),
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            **(more or {}),
        }

    def run(self, command: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in the project's folder, to its end."""
        return subprocess.run(
            [self.program(command), *arguments],
            cwd=self.project,
            env=self.variables(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def python(self, program: str, **env: str) -> str:
        """What a Python program prints; it must end well and complain of nothing."""
        done = self.run("python", "-c", program, **env)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr[-4000:]
        return done.stdout

    @contextmanager
    def started(self, command: str, *arguments: str, **env: str) -> Generator[Running]:
        """A program of the environment for as long as the block lasts, with all that it starts."""
        whole = [self.program(command), *arguments]
        with running(whole, self.variables(env), self.project, cwd=self.project) as process:
            yield process

    def write(self, files: Mapping[str, str]) -> None:
        """Files of the project."""
        for name, text in files.items():
            (self.project / name).parent.mkdir(parents=True, exist_ok=True)
            (self.project / name).write_text(text)


@dataclass
class Environments:
    """Makes environments, and keeps each for who asks for the same again."""

    folder: Path
    _made: dict[tuple[str, ...], Environment] = field(default_factory=dict)

    @property
    def _house(self) -> Path:
        return self.folder / "wheels"

    @property
    def wheel(self) -> Path:
        """The wheel of this repository's code, as it is now."""
        (wheel,) = self._house.glob("openagents_worker-*.whl")
        return wheel

    def download(self) -> None:
        """Build our wheel and get everything that will be installed, once for all test processes.

        The base install comes first and alone: a producer gets the newest Celery, a worker the one that it
        is tied to.
        """
        self.folder.mkdir(exist_ok=True)
        with _locked(self.folder / "lock"):
            if not (self.folder / "complete").exists():
                _pip("wheel", "--wheel-dir", str(self._house), str(ROOT))
                everything = f"{self.wheel}[{','.join(EXTRAS)}]"
                _pip("wheel", "--wheel-dir", str(self._house), everything, *BESIDE)
                (self.folder / "complete").touch()

    def with_extras(self, *extras: str, beside: Sequence[str] = ()) -> Environment:
        """An environment in which `pip install 'openagents-worker[extras]' beside…` was said."""
        if (known := self._made.get((*extras, *beside))) is not None:
            return known
        name = f"env-{os.getpid()}-{len(self._made)}-{'-'.join(extras) or 'base'}"
        project = self.folder / f"{name}-project"
        project.mkdir()
        made = Environment(self.new_environment(name), extras, project)
        asked = f"{self.wheel}[{','.join(extras)}]" if extras else str(self.wheel)
        # What is imported is compiled then; most of what is installed is not.
        here = ["--no-compile", "--no-index", "--find-links", str(self._house)]
        _pip("--python", made.program("python"), "install", *here, asked, *beside)
        self._made[(*extras, *beside)] = made
        return made

    def with_oldest(self, *extras: str) -> Environment:
        """An environment with these extras, and every dependency that we declare at its lowest version."""
        name = f"env-{os.getpid()}-oldest"
        project = self.folder / f"{name}-project"
        project.mkdir()
        made = Environment(self.new_environment(name), extras, project)
        pins = [f"{package}=={version}" for package, version in lowest_versions(*extras).items()]
        asked = f"{self.wheel}[{','.join(extras)}]"
        _pip("--python", made.program("python"), "install", "--no-compile", asked, *pins)
        return made

    def new_environment(self, name: str) -> Path:
        """An empty one. It has no pip: that would bring packages that we may have forgotten to ask for."""
        folder = self.folder / name
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
