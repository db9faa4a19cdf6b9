"""`ripgrep`: with the program `rg` and without it, it finds what `grep_files` finds.

The tests with the program are skipped where it is not installed; `tests/extras` installs it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.errors import ToolValidationError
from openagents_worker.tools.builtin.grep import GrepFiles
from openagents_worker.tools.builtin.ripgrep import Ripgrep

needs_rg = pytest.mark.skipif(shutil.which("rg") is None, reason="the program rg is not installed")
DENY = ["*.pem", "conf/secret", "Build"]


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
    "a type like a glob": {"pattern": "two", "file_type": "*"},
    "one file": {"pattern": "w.r", "path": "a.txt"},
    "one folder": {"pattern": "two", "path": "nested"},
    "the end of a line": {"pattern": "words$", "path": "a.txt"},
    "only in Python's syntax": {"pattern": "(?<=t)wo(?= )"},
    "like an option": {"pattern": "--pre=cat"},
    "nothing": {"pattern": "zzz"},
    "a binary file": {"pattern": "two", "path": "binary"},
}


async def found(tool: GrepFiles, query: dict[str, Any]) -> tuple[list[Any], bool]:
    answer = await tool.invoke(query, None)
    return sorted((m["path"], m["line"], m["text"]) for m in answer["matches"]), answer["truncated"]


@needs_rg
@pytest.mark.parametrize("config", [{}, {"allow_hidden": True}, {"deny": DENY}], ids=["", "hidden", "deny"])
@pytest.mark.parametrize("name", QUERIES)
async def test_it_finds_what_grep_files_finds(folder: Path, name: str, config: dict[str, Any]) -> None:
    """With the program, in the same folder, and under the same rules."""
    config = {"root": str(folder), **config}

    expected = await found(GrepFiles(config), QUERIES[name])

    assert await found(Ripgrep(config), QUERIES[name]) == expected
    assert name in ("like an option", "nothing", "a binary file", "a type like a glob") or expected[0]


@needs_rg
async def test_a_pattern_is_never_an_option(folder: Path) -> None:
    """`rg --pre=program` executes a program for each file."""
    program = folder / "program"
    program.write_text(f"#!/bin/sh\ntouch {folder}/executed\n")
    program.chmod(0o755)

    for pattern in (f"--pre={program}", "-e", "--files"):
        await Ripgrep({"root": str(folder)}).invoke({"pattern": pattern}, None)

    assert not (folder / "executed").exists()


@needs_rg
async def test_a_pattern_that_blocks_python_is_searched_at_once(tmp_path: Path) -> None:
    """ripgrep takes linear time."""
    (tmp_path / "a").write_text("a" * 50 + "b")
    assert (await Ripgrep({"root": str(tmp_path)}).invoke({"pattern": "(a+)+$"}, None))["matches"] == []


@needs_rg
async def test_a_setting_of_the_user_has_no_effect(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ripgrep's configuration file nor any variable."""
    (folder / "config").write_text("--files\n")
    monkeypatch.setenv("RIPGREP_CONFIG_PATH", str(folder / "config"))
    assert (await Ripgrep({"root": str(folder)}).invoke({"pattern": "zzz"}, None))["matches"] == []


@pytest.mark.parametrize(
    "installed", [pytest.param(True, marks=needs_rg), False], ids=["with rg", "without rg"]
)
async def test_more_than_a_hundred_matches_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """The program is not needed. An invalid pattern is the same error in both cases."""
    if not installed:
        monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a").write_text("x\n" * 150)
    tool = Ripgrep({"root": str(tmp_path)})

    answer = await tool.invoke({"pattern": "x"}, None)

    assert (len(answer["matches"]), answer["truncated"]) == (100, True)
    with pytest.raises(ToolValidationError, match="regular expression"):
        await tool.invoke({"pattern": "("}, None)
