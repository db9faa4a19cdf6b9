"""The table of the original SDK's defects: for each, what is right, and the tests that hold it.

`python -m tests.defects` prints it. A test is found by its mark `defect("P11")`, without being imported.
"""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FILE", "ROOT", "Defect", "Revert", "defects", "marked_tests", "place_of", "rows"]

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
FILE = Path(__file__).with_name("defects.toml")


@dataclass(frozen=True)
class Revert:
    """A change that brings a defect back: part of one line of a file, and what stands there instead."""

    file: str
    line: str
    instead: str

    @property
    def place(self) -> str:
        """`file:line`. Raises `ValueError` unless exactly one line of the file has the text."""
        return place_of(self.file, self.line)


@dataclass(frozen=True)
class Defect:
    """One defect. `prevented`: the place that makes it impossible, `file:line`; None if tests hold it."""

    id: str
    right: str
    tests: Sequence[str]
    prevented: str | None
    revert: Revert | None

    @property
    def held_by(self) -> str:
        """What the table says: the tests, or the place."""
        return ", ".join(self.tests) if self.tests else f"cannot occur: {self.prevented}"

    @property
    def fails_without(self) -> str | None:
        """What the table says of a defect whose tests were seen failing without a line."""
        return None if self.revert is None else f"a test fails without {self.revert.place}"


def defects() -> list[Defect]:
    """All of them, in the order of the file. Raises `ValueError` for a line that its file does not have."""
    tests = marked_tests()
    return [
        Defect(
            id_,
            entry["right"],
            tests.get(id_, ()),
            place_of(**entry["prevented"]) if "prevented" in entry else None,
            Revert(**entry["revert"]) if "revert" in entry else None,
        )
        for id_, entry in tomllib.loads(FILE.read_text()).items()
    ]


def marked_tests() -> Mapping[str, list[str]]:
    """The tests with the mark, by the ids in it: `file::name`."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text()
        if "mark.defect(" in text:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    for id_ in _ids(node):
                        found[id_].append(f"{path.relative_to(ROOT)}::{node.name}")
    return found


def _ids(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.defect":
            yield from (str(ast.literal_eval(argument)) for argument in decorator.args)


def place_of(file: str, line: str) -> str:
    """`file:line` of the line that has this text. Raises `ValueError` unless exactly one has it."""
    lines = (ROOT / file).read_text().splitlines()
    found = [number for number, text in enumerate(lines, 1) if line in text]
    if len(found) != 1:
        raise ValueError(f"{file} has {len(found)} lines with {line!r}")
    return f"{file}:{found[0]}"


def rows() -> Iterator[str]:
    """The lines of the table."""
    for defect in defects():
        yield f"{defect.id:<5} {defect.right}"
        yield f"      {defect.held_by}"
        if defect.fails_without is not None:
            yield f"      {defect.fails_without}"
