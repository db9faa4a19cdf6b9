"""`ripgrep`: what it asks the program `rg`, what it makes of its output, and how it does without it.

A script stands in the place of the program. `tests/extras` has the real one.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.errors import PermanentToolError, ToolValidationError
from openagents_worker.tools.builtin.ripgrep import Ripgrep

RG = """#!{python} -S
import json, sys, time
json.dump(sys.argv[1:], open({asked!r}, "w"))
sys.stdout.write(open({output!r}).read())
sys.stdout.flush()
time.sleep({sleep_s})
"""


class Program:
    """The script `rg`: it prints `output`, then sleeps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = ""
        self.sleep_s = 0.0

    @property
    def asked(self) -> list[str]:
        options: list[str] = json.loads((self.folder / "asked").read_text())
        return options

    async def search(self, root: Path, config: dict[str, Any] | None = None, **query: Any) -> dict[str, Any]:
        (self.folder / "output").write_text(self.output)
        names = {name: str(self.folder / name) for name in ("asked", "output")}
        (self.folder / "rg").write_text(RG.format(python=sys.executable, sleep_s=self.sleep_s, **names))
        (self.folder / "rg").chmod(0o755)
        answer: dict[str, Any] = await Ripgrep({"root": str(root), **(config or {})}).invoke(query, None)
        return answer


@pytest.fixture
def program(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Program:
    folder = tmp_path_factory.mktemp("program")
    monkeypatch.setenv("PATH", str(folder))
    return Program(folder)


def messages(*files: tuple[Path, int, int | None]) -> str:
    """The output for files: a path, its number of matches, and where it is binary."""
    lines: list[dict[str, Any]] = []
    for path, count, binary_offset in files:
        match = {
            "path": {"text": str(path)},
            "lines": {"text": "a line\r\n"},
            "line_number": 1,
            "submatches": [{"start": 2, "end": 6}],
        }
        lines += [{"type": "begin", "data": {}}, *[{"type": "match", "data": match}] * count]
        lines.append({"type": "end", "data": {"path": {"text": str(path)}, "binary_offset": binary_offset}})
    lines.append({"type": "summary", "data": {}})
    return "".join(json.dumps(line) + "\n" for line in lines)


async def test_the_pattern_is_one_argument_and_no_option(tmp_path: Path, program: Program) -> None:
    """No configuration file is read, hidden files are left out, and no other file is followed."""
    program.output = messages()

    await program.search(
        tmp_path, {"deny": ["*.pem", "a/b"]}, pattern="--pre=x", file_type="py", case_sensitive=False
    )

    assert program.asked[-2:] == ["--", str(tmp_path)]
    assert {
        "--no-config",
        "--json",
        "--regexp=--pre=x",
        "--glob=*.py",
        "--ignore-case",
        "--iglob=!*.pem",
    } <= set(program.asked)
    assert not {"--hidden", "--follow", "--pre=x"} & set(program.asked)


@pytest.mark.parametrize(("pattern", "is_asked"), [("x$", True), (r"x\r$", False), (r"\\\\run$", True)])
async def test_a_carriage_return_belongs_to_the_end_of_a_line(
    tmp_path: Path, program: Program, pattern: str, is_asked: bool
) -> None:
    """Unless the pattern names it: with this option, the program refuses such a pattern."""
    program.output = messages()
    await program.search(tmp_path, pattern=pattern)
    assert ("--crlf" in program.asked) is is_asked


async def test_matches_in_files_that_may_not_be_seen_are_dropped(tmp_path: Path, program: Program) -> None:
    """Whatever the program has searched. Binary files are counted as skipped."""
    seen = [(tmp_path / name, 1, None) for name in ("a/ok", ".env", "key.pem", "a/b/c")]
    program.output = messages(*seen, (tmp_path / "binary", 2, 7))

    found = await program.search(tmp_path, {"deny": ["*.pem", "a/b"]}, pattern="x")

    assert found == {
        "matches": [{"path": "a/ok", "line": 1, "text": "a line"}],
        "skipped": 1,
        "truncated": False,
    }


async def test_names_and_lines_that_are_not_utf8_are_read(tmp_path: Path, program: Program) -> None:
    """The program sends them as base64."""
    path = {"bytes": base64.b64encode(str(tmp_path).encode() + b"/caf\xe9").decode()}
    lines_of_match = {"bytes": base64.b64encode(b"\xe9\n").decode()}
    match = {"path": path, "lines": lines_of_match, "line_number": 3, "submatches": []}
    end = {"path": path, "binary_offset": None}
    lines = [{"type": "match", "data": match}, {"type": "end", "data": end}, {"type": "summary", "data": {}}]
    program.output = "\n".join(map(json.dumps, lines))

    found = await program.search(tmp_path, pattern="x")

    assert found["matches"] == [{"path": "caf\\xe9", "line": 3, "text": "\ufffd"}]


async def test_more_than_a_hundred_matches_are_cut(tmp_path: Path, program: Program) -> None:
    program.output = messages((tmp_path / "a", 150, None))
    found = await program.search(tmp_path, pattern="x")
    assert (len(found["matches"]), found["truncated"]) == (100, True)


async def test_a_search_that_takes_too_long_is_ended(tmp_path: Path, program: Program) -> None:
    program.sleep_s = 600
    with pytest.raises(PermanentToolError, match="longer than 50 ms"):
        await program.search(tmp_path, {"timeout_ms": 50}, pattern="x")


async def test_a_pattern_that_the_program_refuses_is_searched_by_python(
    tmp_path: Path, program: Program
) -> None:
    """It has printed no summary then."""
    (tmp_path / "a").write_text("two words\n")
    found = await program.search(tmp_path, pattern="(?<=t)wo(?= )")
    assert found["matches"] == [{"path": "a", "line": 1, "text": "two words"}]


async def test_the_program_is_not_needed(tmp_path: Path, program: Program) -> None:
    """An invalid pattern is the same error in both cases."""
    (tmp_path / "a").write_text("x\n" * 150)
    tool = Ripgrep({"root": str(tmp_path)})

    answer = await tool.invoke({"pattern": "x"}, None)

    assert (len(answer["matches"]), answer["truncated"]) == (100, True)
    with pytest.raises(ToolValidationError, match="regular expression"):
        await tool.invoke({"pattern": "("}, None)
    with pytest.raises(ToolValidationError, match="regular expression"):
        await program.search(tmp_path, pattern="(")
