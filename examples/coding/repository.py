"""The repository on which the agent works: a project of one file, which is created if there is none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["FILES", "create", "git", "path"]

FILES = {"greet.py": 'def greet() -> str:\n    return "Hello!"\n', "README.md": "# Greeter\n\nIt greets.\n"}


def path() -> Path:
    """The folder of the repository, as in the agents file."""
    return Path(os.environ.get("CODING_REPOSITORY", "var/.greeter"))


def create() -> None:
    """Create the repository with its first commit, unless the folder exists."""
    if path().exists():
        return
    path().mkdir(parents=True)
    for name, text in FILES.items():
        (path() / name).write_text(text)
    git("init", "--quiet")
    git("config", "user.name", "Coder")
    git("config", "user.email", "coder@example.com")
    git("add", *FILES)
    git("commit", "--quiet", "--message", "Begin")


def git(*arguments: str) -> str:
    """What a command of git prints."""
    done = subprocess.run(["git", *arguments], cwd=path(), check=True, capture_output=True, text=True)
    return done.stdout
