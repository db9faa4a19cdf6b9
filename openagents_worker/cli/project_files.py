"""The project that `init` writes. Its texts are the templates in the folder `project`."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from openagents_worker.errors import ConfigError
from openagents_worker.store.fleet import own_version

__all__ = ["write_project"]

FILES = {
    "README.md": "README.md",
    "Makefile": "Makefile",
    "requirements.txt": "requirements.txt",
    "Procfile": "Procfile",
    ".gitignore": "gitignore",
    "config/agents.json": "agents.json",
    "parcels.py": "parcels.py",
    "submit.py": "submit.py",
    "tasks/__init__.py": "tasks.py",
    "conftest.py": "conftest.py",
    "tests/test_support.py": "test_support.py",
}
"""The path of each file in the project, and its template."""


def write_project(folder: Path) -> list[Path]:
    """Write the files and return their paths. The folder is made if it does not exist.

    Nothing is replaced: raises `ConfigError`, and writes nothing, if one of the files exists.
    """
    existing = [path for path in FILES if (folder / path).exists()]
    if existing:
        raise ConfigError(
            f"{folder} has {', '.join(existing)} already, and nothing is replaced",
            hint="name a folder that is new or empty",
        )
    values = {"name": folder.resolve().name, "version": _release(own_version())}
    written = []
    try:
        for path, template in FILES.items():
            text = files(__package__).joinpath("project", f"{template}.template").read_text("utf-8")
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(Template(text).substitute(values), "utf-8")
            written.append(target)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
    return written


def _release(version: str) -> str:
    """The numbers of a version: what a newer release satisfies, too."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found[0] if found else "0"
