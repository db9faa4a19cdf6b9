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
from typing import Any

__all__ = ["FILE", "ROOT", "Defect", "defects", "marked_tests", "rows"]

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
FILE = Path(__file__).with_name("defects.toml")


@dataclass(frozen=True)
class Defect:
    """One defect. `prevented`: the place that makes it impossible, `file:line`; None if tests hold it."""

    id: str
    right: str
    tests: Sequence[str]
    prevented: str | None

    @property
    def held_by(self) -> str:
        """What the table says: the tests, or the place."""
        return ", ".join(self.tests) if self.tests else f"cannot occur: {self.prevented}"


def defects() -> list[Defect]:
    """All of them, in the order of the file. Raises `ValueError` for a line that its file does not have."""
    tests = marked_tests()
    return [
        Defect(id_, entry["right"], tests.get(id_, ()), _place(entry.get("prevented")))
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


def _place(prevented: Mapping[str, Any] | None) -> str | None:
    if prevented is None:
        return None
    lines = (ROOT / prevented["file"]).read_text().splitlines()
    found = [number for number, line in enumerate(lines, 1) if prevented["line"] in line]
    if len(found) != 1:
        raise ValueError(f"{prevented['file']} has {len(found)} lines with {prevented['line']!r}")
    return f"{prevented['file']}:{found[0]}"


def rows() -> Iterator[str]:
    """The lines of the table."""
    for defect in defects():
        yield f"{defect.id:<5} {defect.right}"
        yield f"      {defect.held_by}"
